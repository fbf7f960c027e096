// Each attribute that Python code reads of a tensor costs as much as a small norm; here sizes and
// memory come from DLPack's exchange table, and the rest from torch's own C functions.
#include "ordinary.h"

#include <algorithm>

namespace py = pybind11;

namespace fastllm {
namespace {

constexpr int kMaxGuards = 16;

// A question that torch answers: a callable without arguments, asked through its C function where it
// has one, since the interpreter's way around a call costs as much as the answer.
struct Question {
  PyObject* callable = nullptr;
  PyCFunction function = nullptr;
  PyObject* self = nullptr;

  Question() = default;
  explicit Question(PyObject* asked) : callable(asked) {
    if (!PyCFunction_CheckExact(asked) || PyCFunction_GET_FLAGS(asked) != METH_NOARGS) return;
    function = PyCFunction_GET_FUNCTION(asked);
    self = PyCFunction_GET_SELF(asked);
  }
  PyObject* ask() const { return function ? function(self, nullptr) : PyObject_CallNoArgs(callable); }
};

// What bind_torch was given; empty until then. References are kept for the life of the process.
struct Torch {
  const dlpack::ExchangeApi* api = nullptr;
  PyObject *tensor, *parameter;
  PyObject *empty_like, *pool_empty_like;
  int64_t pool_from;
  PyObject* new_empty_strided;            // a method of tensors
  PyObject *is_negative, *requires_grad;  // a method and an attribute of tensors
  Question grad_enabled, threads, deterministic;
  PyObject *choice, *forward_ad;
  Question guards[kMaxGuards];
  int guard_count;
  PyObject *name, *level;
} torch_;

// Whether the answer is 0, False or None.
bool says_no(const Question& question) {
  PyObject* said = question.ask();
  if (!said) return PyErr_Clear(), false;
  const int truth = said == Py_None || said == Py_False ? 0 : PyObject_IsTrue(said);
  Py_DECREF(said);
  return truth == 0;
}

}  // namespace

PyObject* ask_method(PyObject* method, PyObject* tensor) {
  if (Py_IS_TYPE(method, &PyMethodDescr_Type)) {
    const PyMethodDef* def = reinterpret_cast<PyMethodDescrObject*>(method)->d_method;
    if (def->ml_flags == METH_NOARGS) return def->ml_meth(tensor, nullptr);
  }
  return PyObject_CallOneArg(method, tensor);
}

PyObject* ask_attribute(PyObject* descriptor, PyObject* tensor) {
  if (Py_IS_TYPE(descriptor, &PyGetSetDescr_Type)) {
    const PyGetSetDef* def = reinterpret_cast<PyGetSetDescrObject*>(descriptor)->d_getset;
    if (def->get) return def->get(tensor, def->closure);
  }
  return PyObject_CallMethod(descriptor, "__get__", "O", tensor);
}

bool nothing_special() {
  if (!torch_.api) return false;
  for (int i = 0; i < torch_.guard_count; ++i)
    if (!says_no(torch_.guards[i])) return false;
  PyObject* level = PyDict_GetItem(torch_.forward_ad, torch_.level);
  if (!level || PyLong_AsLong(level) >= 0) return PyErr_Clear(), false;
  PyObject* name = PyObject_GetAttr(torch_.choice, torch_.name);
  if (!name) return PyErr_Clear(), false;
  Py_DECREF(name);
  return name == Py_None;
}

bool is_any_tensor(PyObject* object) {
  return torch_.api && PyType_IsSubtype(Py_TYPE(object), (PyTypeObject*)torch_.tensor);
}

bool is_plain(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != torch_.tensor && type != torch_.parameter) return false;
  PyObject* negative = ask_method(torch_.is_negative, object);
  if (!negative) return PyErr_Clear(), false;
  Py_DECREF(negative);
  return negative == Py_False;
}

bool view_of(PyObject* object, dlpack::Tensor& view) {
  return torch_.api->view_of_object(object, &view) == 0 || (PyErr_Clear(), false);
}

bool wants_grad(PyObject* object) {
  PyObject* flag = ask_attribute(torch_.requires_grad, object);
  if (!flag) return PyErr_Clear(), false;
  Py_DECREF(flag);
  return flag == Py_True;
}

bool grad_enabled() { return !says_no(torch_.grad_enabled); }

bool deterministic() { return !says_no(torch_.deterministic); }

int thread_count() {
  PyObject* said = torch_.threads.ask();
  const long count = said ? PyLong_AsLong(said) : 1;
  Py_XDECREF(said);
  return count > 0 ? int(count) : (PyErr_Clear(), 1);
}

bool View::contiguous() {
  numel = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.strides && t.shape[d] != 1 && t.strides[d] != numel) return false;
    numel *= t.shape[d];
  }
  return true;
}

bool View::read_any(PyObject* object) {
  return is_any_tensor(object) && view_of(object, t) && t.device.type == dlpack::kCpu &&
         t.dtype.lanes == 1 && contiguous();
}

bool View::read(PyObject* object) {
  if (!read_any(object)) return false;
  if (t.dtype.code == dlpack::kFloat && t.dtype.bits == 32)
    dtype = kFloat32;
  else if (t.dtype.code == dlpack::kFloat && t.dtype.bits == 16)
    dtype = kFloat16;
  else if (t.dtype.code == dlpack::kBfloat)
    dtype = kBFloat16;
  else
    return false;
  return true;
}

bool View::same_as(const View& o) const {
  return dtype == o.dtype && t.ndim == o.t.ndim && std::equal(t.shape, t.shape + t.ndim, o.t.shape);
}

namespace {

// `made` itself, and where its memory is.
PyObject* with_memory(PyObject* made, void*& data) {
  dlpack::Tensor view{};
  if (!made) return nullptr;
  if (torch_.api->view_of_object(made, &view) != 0) return Py_DECREF(made), nullptr;
  data = static_cast<char*>(view.data) + view.byte_offset;
  return made;
}

}  // namespace

PyObject* allocate_like(PyObject* object, int64_t bytes, void*& data) {
  PyObject* make = bytes < torch_.pool_from ? torch_.empty_like : torch_.pool_empty_like;
  return with_memory(PyObject_CallOneArg(make, object), data);
}

PyObject* allocate_shape(PyObject* object, const int64_t* sizes, int dims, void*& data) {
  const py::object shape = py::reinterpret_steal<py::object>(PyTuple_New(dims));
  const py::object strides = py::reinterpret_steal<py::object>(PyTuple_New(dims));
  if (!shape || !strides) return nullptr;
  int64_t next = 1;
  for (int d = dims - 1; d >= 0; next *= std::max(sizes[d--], int64_t(1))) {
    PyTuple_SET_ITEM(shape.ptr(), d, PyLong_FromLongLong(sizes[d]));
    PyTuple_SET_ITEM(strides.ptr(), d, PyLong_FromLongLong(next));
    if (PyErr_Occurred()) return nullptr;
  }
  // strides given, torch takes two thirds of the time
  PyObject* const given[] = {object, shape.ptr(), strides.ptr()};
  return with_memory(PyObject_Vectorcall(torch_.new_empty_strided, given, 3, nullptr), data);
}

namespace {

void bind_torch(py::object tensor, py::object parameter, py::object empty_like,
                py::object pool_empty_like, int64_t pool_from, py::object new_empty_strided,
                py::object is_negative, py::object requires_grad, py::object grad_enabled,
                py::object threads, py::object deterministic, py::object choice,
                py::dict forward_ad, py::tuple guards) {
  py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  while (api && api->major != dlpack::kMajor) api = api->previous;
  if (!api || !api->view_of_object || guards.size() > kMaxGuards) return;
  torch_.tensor = tensor.release().ptr();
  torch_.parameter = parameter.release().ptr();
  torch_.empty_like = empty_like.release().ptr();
  torch_.pool_empty_like = pool_empty_like.release().ptr();
  torch_.pool_from = pool_from;
  torch_.new_empty_strided = new_empty_strided.release().ptr();
  torch_.is_negative = is_negative.release().ptr();
  torch_.requires_grad = requires_grad.release().ptr();
  torch_.grad_enabled = Question(grad_enabled.release().ptr());
  torch_.threads = Question(threads.release().ptr());
  torch_.deterministic = Question(deterministic.release().ptr());
  torch_.choice = choice.release().ptr();
  torch_.forward_ad = forward_ad.release().ptr();
  torch_.guard_count = 0;
  for (py::handle guard : guards) torch_.guards[torch_.guard_count++] = Question(guard.inc_ref().ptr());
  torch_.name = PyUnicode_InternFromString("name");
  torch_.level = PyUnicode_InternFromString("_current_level");
  torch_.api = api;
}

}  // namespace

void def_ordinary(py::module_& m) {
  m.def("bind_torch", &bind_torch, "Gives the calls in C what they need of torch; once.");
}

}  // namespace fastllm

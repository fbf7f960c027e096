// Ordinary calls in one step: check, allocate, run. Each attribute that Python code reads of a
// tensor costs as much as a small norm; here they come from DLPack's exchange table.
//
// fast_<op>(args...) returns the op's result; True when the call is ordinary but wants gradients;
// None when it is anything else (another device or dtype, strides, a mode, a wrong shape): the
// caller's general path serves it or explains what is wrong.
#include "fast_call.h"

#include <algorithm>
#include <new>

#include "cpu/isa.h"
#include "cpu/kernels/norm.h"
#include "cpu/types.h"

namespace py = pybind11;

namespace fastllm {
namespace {

constexpr int64_t kSmall = 32 << 10;  // bytes below which threads and the GIL are left alone
constexpr int kMaxGuards = 16;

// What bind_torch was given; empty until then. References are kept for the life of the process.
struct Torch {
  const dlpack::ExchangeApi* api = nullptr;
  PyObject *tensor, *parameter;
  PyObject *empty_like, *pool_empty_like;
  int64_t pool_from;
  PyObject *is_negative, *grad_enabled, *threads;
  PyObject *choice, *forward_ad;
  PyObject* guards[kMaxGuards];
  int guard_count;
  PyObject *name, *level, *requires_grad;
} torch_;

enum Answer { kRun, kWantsGrad, kDecline };

PyObject* answer(Answer a) { return Py_NewRef(a == kWantsGrad ? Py_True : Py_None); }

// A callable without arguments that says 0, False or None.
bool says_no(PyObject* callable) {
  PyObject* said = PyObject_CallNoArgs(callable);
  if (!said) return PyErr_Clear(), false;
  const int truth = said == Py_None ? 0 : PyObject_IsTrue(said);
  Py_DECREF(said);
  return truth == 0;
}

}  // namespace

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
  PyObject* negative = PyObject_CallOneArg(torch_.is_negative, object);
  if (!negative) return PyErr_Clear(), false;
  Py_DECREF(negative);
  return negative == Py_False;
}

bool view_of(PyObject* object, dlpack::Tensor& view) {
  return torch_.api->view_of_object(object, &view) == 0 || (PyErr_Clear(), false);
}

bool wants_grad(PyObject* object) {
  PyObject* flag = PyObject_GetAttr(object, torch_.requires_grad);
  if (!flag) return PyErr_Clear(), false;
  Py_DECREF(flag);
  return flag == Py_True;
}

bool grad_enabled() { return !says_no(torch_.grad_enabled); }

int thread_count() {
  PyObject* said = PyObject_CallNoArgs(torch_.threads);
  const long count = said ? PyLong_AsLong(said) : 1;
  Py_XDECREF(said);
  return count > 0 ? int(count) : (PyErr_Clear(), 1);
}

namespace {

// A contiguous CPU tensor of a dtype that the kernels take.
struct View {
  dlpack::Tensor t{};
  int dtype = kFloat32;
  int64_t numel = 1;

  bool read(PyObject* object) {
    if (!view_of(object, t)) return false;
    if (t.device.type != dlpack::kCpu || t.dtype.lanes != 1) return false;
    if (t.dtype.code == dlpack::kFloat && t.dtype.bits == 32)
      dtype = kFloat32;
    else if (t.dtype.code == dlpack::kFloat && t.dtype.bits == 16)
      dtype = kFloat16;
    else if (t.dtype.code == dlpack::kBfloat)
      dtype = kBFloat16;
    else
      return false;
    for (int d = t.ndim - 1; d >= 0; --d) {
      if (t.strides && t.shape[d] != 1 && t.strides[d] != numel) return false;
      numel *= t.shape[d];
    }
    return true;
  }
  void* data() const { return static_cast<char*>(t.data) + t.byte_offset; }
  int64_t bytes() const { return numel * (dtype == kFloat32 ? 4 : 2); }
  bool same_as(const View& o) const {
    return dtype == o.dtype && t.ndim == o.t.ndim && std::equal(t.shape, t.shape + t.ndim, o.t.shape);
  }
};

// Reads an argument that may be None.
bool read_optional(PyObject* object, View& view) { return object == Py_None || view.read(object); }

// Decides on all tensor arguments at once.
Answer examine(PyObject* const* tensors, int count) {
  if (!nothing_special()) return kDecline;
  for (int i = 0; i < count; ++i)
    if (tensors[i] != Py_None && !is_plain(tensors[i])) return kDecline;
  if (!grad_enabled()) return kRun;
  for (int i = 0; i < count; ++i)
    if (tensors[i] != Py_None && wants_grad(tensors[i])) return kWantsGrad;
  return kRun;
}

int threads_for(int64_t bytes) { return bytes < kSmall ? 1 : thread_count(); }

// A new tensor like `object`, and where its memory is. Null with a Python error set.
PyObject* allocate_like(PyObject* object, int64_t bytes, void*& data) {
  PyObject* made = PyObject_CallOneArg(
      bytes < torch_.pool_from ? torch_.empty_like : torch_.pool_empty_like, object);
  dlpack::Tensor view{};
  if (!made) return nullptr;
  if (torch_.api->view_of_object(made, &view) != 0) return Py_DECREF(made), nullptr;
  data = static_cast<char*>(view.data) + view.byte_offset;
  return made;
}

// Runs a kernel, without the GIL when that pays. False with a Python error set.
template <class Arguments>
bool launch(void (*kernel)(const Arguments&), const Arguments& arguments, int64_t bytes) {
  bool enough_memory = true;
  PyThreadState* state = bytes < kSmall ? nullptr : PyEval_SaveThread();
  try {
    kernel(arguments);
  } catch (const std::bad_alloc&) {
    enough_memory = false;
  }
  if (state) PyEval_RestoreThread(state);
  return enough_memory || (PyErr_NoMemory(), false);
}

// The sizes of normalized_shape are the last ones of x, and those of each parameter.
bool shape_fits(PyObject* shape, const View& x, PyObject* const* params, const View* views,
                int count, int64_t& cols) {
  if (!PyTuple_CheckExact(shape)) return false;
  const Py_ssize_t dims = PyTuple_GET_SIZE(shape);
  if (dims < 1 || dims > x.t.ndim) return false;
  cols = 1;
  for (Py_ssize_t d = 0; d < dims; ++d) {
    const int64_t size = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, d));
    if (size < 0) return PyErr_Clear(), false;
    if (x.t.shape[x.t.ndim - dims + d] != size) return false;
    for (int p = 0; p < count; ++p)
      if (params[p] != Py_None && (views[p].t.ndim != dims || views[p].t.shape[d] != size))
        return false;
    cols *= size;
  }
  return cols > 0;
}

template <bool kLayer, bool kAdd>
PyObject* fast_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr int kInputs = kAdd ? 2 : 1, kParams = kLayer ? 2 : 1;
  constexpr int kCount = kInputs + 1 + kParams + 2;
  if (count != kCount)
    return PyErr_Format(PyExc_TypeError, "expected %d arguments, found %zd", kCount, count);
  PyObject* const* params = args + kInputs + 1;
  PyObject* tensors[kInputs + kParams];
  std::copy(args, args + kInputs, tensors);
  std::copy(params, params + kParams, tensors + kInputs);
  const Answer a = examine(tensors, kInputs + kParams);
  if (a == kDecline) return answer(a);

  View x, residual, views[kParams];
  if (!x.read(args[0])) return answer(kDecline);
  if (kAdd && !(residual.read(args[1]) && residual.same_as(x))) return answer(kDecline);
  for (int p = 0; p < kParams; ++p)
    if (!read_optional(params[p], views[p])) return answer(kDecline);
  const int weight_dtype = views[kLayer && params[0] == Py_None ? kParams - 1 : 0].dtype;
  for (int p = 0; p < kParams; ++p)
    if (params[p] != Py_None && views[p].dtype != weight_dtype) return answer(kDecline);
  int64_t cols;
  if (!shape_fits(args[kInputs], x, params, views, kParams, cols)) return answer(kDecline);
  const double eps = PyFloat_AsDouble(args[kCount - 2]);
  const double offset = PyFloat_AsDouble(args[kCount - 1]);
  if (PyErr_Occurred()) return PyErr_Clear(), answer(kDecline);
  if (a == kWantsGrad) return answer(a);  // every check has passed: what runs next makes none

  const int64_t bytes = x.bytes();
  void *out = nullptr, *sum = nullptr;
  PyObject* output = allocate_like(args[0], bytes, out);
  if (!output) return nullptr;
  PyObject* new_residual = kAdd ? allocate_like(args[0], bytes, sum) : nullptr;
  if (kAdd && !new_residual) return Py_DECREF(output), nullptr;
  const auto pointer = [&](int p) { return params[p] == Py_None ? nullptr : views[p].data(); };
  const norm::Forward arguments{x.dtype,
                              weight_dtype,
                              x.data(),
                              kAdd ? residual.data() : nullptr,
                              pointer(0),
                              kLayer ? pointer(kParams - 1) : nullptr,
                              out,
                              sum,
                              x.numel / cols,
                              cols,
                              eps,
                              float(offset),
                              threads_for(bytes)};
  const norm::Kernels& table = norm::kernels();
  const bool ran = launch(kLayer ? table.layer_norm_fwd : table.rms_norm_fwd, arguments, bytes);
  PyObject* result = ran ? (kAdd ? PyTuple_Pack(2, output, new_residual) : Py_NewRef(output)) : nullptr;
  Py_DECREF(output);
  Py_XDECREF(new_residual);
  return result;
}

// bind_torch(Tensor, Parameter, empty_like, pool_empty_like, pool_from, Tensor.is_neg,
//            is_grad_enabled, get_num_threads, choice, forward_ad.__dict__, guards)
void bind_torch(py::object tensor, py::object parameter, py::object empty_like,
                py::object pool_empty_like, int64_t pool_from, py::object is_negative,
                py::object grad_enabled, py::object threads, py::object choice, py::dict forward_ad, py::tuple guards) {
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
  torch_.is_negative = is_negative.release().ptr();
  torch_.grad_enabled = grad_enabled.release().ptr();
  torch_.threads = threads.release().ptr();
  torch_.choice = choice.release().ptr();
  torch_.forward_ad = forward_ad.release().ptr();
  torch_.guard_count = 0;
  for (py::handle guard : guards) torch_.guards[torch_.guard_count++] = guard.inc_ref().ptr();
  torch_.name = PyUnicode_InternFromString("name");
  torch_.level = PyUnicode_InternFromString("_current_level");
  torch_.requires_grad = PyUnicode_InternFromString("requires_grad");
  torch_.api = api;
}

template <bool kLayer, bool kAdd>
void def_norm(py::module_& m, const char* name, const char* arguments) {
  static PyMethodDef method{};
  method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&fast_norm<kLayer, kAdd>)),
            METH_FASTCALL, arguments};
  m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, nullptr, nullptr));
}

}  // namespace

void def_fast_calls(py::module_& m) {
  m.def("bind_torch", &bind_torch, "Gives the fast calls what they need of torch; once.");
  def_norm<false, false>(m, "fast_rms_norm", "input, normalized_shape, weight, eps, weight_offset");
  def_norm<true, false>(m, "fast_layer_norm",
                        "input, normalized_shape, weight, bias, eps, weight_offset");
  def_norm<false, true>(m, "fast_add_rms_norm",
                        "input, residual, normalized_shape, weight, eps, weight_offset");
  def_norm<true, true>(m, "fast_add_layer_norm",
                       "input, residual, normalized_shape, weight, bias, eps, weight_offset");
}

}  // namespace fastllm

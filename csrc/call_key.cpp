// A call as one number: what a table of measured choices is asked with on every call. Reading the
// shapes, dtypes and strides of three tensors from Python costs more than a microsecond; this a
// quarter of one.
#include "call_key.h"

#include <cstdint>

#include "dlpack_exchange.h"

namespace py = pybind11;

namespace fastllm {
namespace {

// What bind_call_key was given; kept for the life of the process.
struct Torch {
  const dlpack::ExchangeApi* api = nullptr;
  PyObject *tensor, *parameter, *grad_enabled, *threads, *deterministic, *requires_grad;
} torch_;

// splitmix64: every bit of `value` reaches every bit of the state
void mix(uint64_t& state, uint64_t value) {
  state += value + 0x9e3779b97f4a7c15u;
  state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9u;
  state = (state ^ (state >> 27)) * 0x94d049bb133111ebu;
  state ^= state >> 31;
}

bool is_tensor(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == torch_.tensor || type == torch_.parameter;
}

bool mix_tensor(uint64_t& state, PyObject* object) {
  dlpack::Tensor t{};
  if (torch_.api->view_of_object(object, &t) != 0) return PyErr_Clear(), false;
  mix(state, uint64_t(t.dtype.code) << 8 | t.dtype.bits);
  mix(state, uint64_t(t.device.type) << 32 | uint32_t(t.device.id));
  int64_t size = 1;
  bool contiguous = true;
  for (int d = t.ndim - 1; d >= 0; --d) {
    mix(state, uint64_t(t.shape[d]));
    contiguous &= !t.strides || t.shape[d] == 1 || t.strides[d] == size;
    size *= t.shape[d];
  }
  // how it is not contiguous matters, too: a transposed matrix is not an expanded one
  for (int d = 0; !contiguous && d < t.ndim; ++d) mix(state, uint64_t(t.strides[d]));
  mix(state, uint64_t(t.ndim));
  return true;
}

// -1: a Python error, which is cleared; else the truth of what `callable` says.
int truth(PyObject* callable) {
  PyObject* said = PyObject_CallNoArgs(callable);
  const int value = said ? PyObject_IsTrue(said) : -1;
  Py_XDECREF(said);
  if (value < 0) PyErr_Clear();
  return value;
}

bool wants_grad(PyObject* object) {
  PyObject* flag = PyObject_GetAttr(object, torch_.requires_grad);
  if (!flag) return PyErr_Clear(), false;
  Py_DECREF(flag);
  return flag == Py_True;
}

// call_key(args, training): `training` None asks the tensors and the grad mode.
PyObject* call_key(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(given[0]))
    return PyErr_Format(PyExc_TypeError, "call_key: expected a tuple and True, False or None");
  if (!torch_.api) Py_RETURN_NONE;
  uint64_t state = 0;
  bool grad = given[1] == Py_True, ask = given[1] == Py_None;
  const Py_ssize_t size = PyTuple_GET_SIZE(given[0]);
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* value = PyTuple_GET_ITEM(given[0], i);
    if (is_tensor(value)) {
      if (!mix_tensor(state, value)) Py_RETURN_NONE;
      grad = grad || (ask && wants_grad(value));
    } else if (PyType_IsSubtype(Py_TYPE(value), reinterpret_cast<PyTypeObject*>(torch_.tensor))) {
      Py_RETURN_NONE;  // a subclass, or traced
    } else {
      const Py_hash_t hash = PyObject_Hash(value);
      if (hash == -1 && PyErr_Occurred()) return PyErr_Clear(), Py_NewRef(Py_None);
      mix(state, uint64_t(hash) ^ 0x5bd1e995u);
    }
  }
  if (grad && ask) grad = truth(torch_.grad_enabled) == 1;
  PyObject* threads = PyObject_CallNoArgs(torch_.threads);
  const long number = threads ? PyLong_AsLong(threads) : 0;
  Py_XDECREF(threads);
  if (PyErr_Occurred()) PyErr_Clear();
  mix(state, uint64_t(number) << 2 | uint64_t(truth(torch_.deterministic) == 1) << 1 | grad);
  // the lowest bit says which direction was found
  return PyLong_FromUnsignedLongLong((state & ~uint64_t(1)) | grad);
}

// bind_call_key(Tensor, Parameter, is_grad_enabled, get_num_threads, deterministic)
void bind_call_key(py::object tensor, py::object parameter, py::object grad_enabled,
                   py::object threads, py::object deterministic) {
  py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  while (api && api->major != dlpack::kMajor) api = api->previous;
  if (!api || !api->view_of_object) return;
  torch_.tensor = tensor.release().ptr();
  torch_.parameter = parameter.release().ptr();
  torch_.grad_enabled = grad_enabled.release().ptr();
  torch_.threads = threads.release().ptr();
  torch_.deterministic = deterministic.release().ptr();
  torch_.requires_grad = PyUnicode_InternFromString("requires_grad");
  torch_.api = api;
}

}  // namespace

void def_call_key(py::module_& m) {
  m.def("bind_call_key", &bind_call_key, "Gives call_key what it needs of torch; once.");
  static PyMethodDef method{
      "call_key", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_key)),
      METH_FASTCALL,
      "A call's arguments as a number, odd when gradients are wanted; None: no plain tensors."};
  m.attr("call_key") = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, nullptr, nullptr));
}

}  // namespace fastllm

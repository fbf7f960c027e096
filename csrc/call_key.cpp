// A call as one number: what an op is asked with, on every call, for the backend to run. Reading
// the shapes, dtypes and strides of three tensors from Python costs more than a microsecond; this a
// quarter of one.
#include "call_key.h"

#include <cstdint>
#include <cstring>

#include "dlpack_exchange.h"
#include "fast_call.h"

namespace py = pybind11;

namespace fastllm {
namespace {

PyObject* deterministic = nullptr;  // what bind_call_key was given, for the life of the process

// splitmix64: every bit of `value` reaches every bit of the state
void mix(uint64_t& state, uint64_t value) {
  state += value + 0x9e3779b97f4a7c15u;
  state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9u;
  state = (state ^ (state >> 27)) * 0x94d049bb133111ebu;
  state ^= state >> 31;
}

bool mix_tensor(uint64_t& state, PyObject* object) {
  dlpack::Tensor t{};
  if (!view_of(object, t)) return false;
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

// An argument that is no tensor. By value where the hash is not: -1 and -2 have the same.
bool mix_value(uint64_t& state, PyObject* value) {
  if (PyTuple_CheckExact(value)) {
    const Py_ssize_t size = PyTuple_GET_SIZE(value);
    mix(state, uint64_t(size));
    for (Py_ssize_t i = 0; i < size; ++i)
      if (!mix_value(state, PyTuple_GET_ITEM(value, i))) return false;
    return true;
  }
  if (PyFloat_CheckExact(value)) {
    const double number = PyFloat_AS_DOUBLE(value);
    uint64_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    mix(state, bits);
    return true;
  }
  const bool integer = PyLong_CheckExact(value);
  const int64_t number = integer ? PyLong_AsLongLong(value) : PyObject_Hash(value);
  if (number == -1 && PyErr_Occurred()) return PyErr_Clear(), false;
  mix(state, uint64_t(number));
  return true;
}

// call_key(args, training): `training` None asks the tensors and the grad mode, and declines what
// is no ordinary call.
PyObject* call_key(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(given[0]))
    return PyErr_Format(PyExc_TypeError, "call_key: expected a tuple and True, False or None");
  const bool ask = given[1] == Py_None;
  if (!deterministic || (ask && !nothing_special())) Py_RETURN_NONE;
  uint64_t state = 0;
  bool grad = given[1] == Py_True;
  const Py_ssize_t size = PyTuple_GET_SIZE(given[0]);
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* value = PyTuple_GET_ITEM(given[0], i);
    if (is_any_tensor(value)) {  // no subclass, nothing traced
      if (!is_plain(value) || !mix_tensor(state, value)) Py_RETURN_NONE;
      grad = grad || (ask && wants_grad(value));
    } else if (!mix_value(state, value)) {
      Py_RETURN_NONE;
    }
  }
  if (grad && ask) grad = grad_enabled();
  PyObject* said = PyObject_CallNoArgs(deterministic);
  const bool repeatable = said != Py_False;
  Py_XDECREF(said);
  if (!said) PyErr_Clear();
  mix(state, uint64_t(thread_count()) << 2 | uint64_t(repeatable) << 1 | grad);
  // the lowest bit says which direction was found
  return PyLong_FromUnsignedLongLong((state & ~uint64_t(1)) | grad);
}

}  // namespace

void def_call_key(py::module_& m) {
  m.def(
      "bind_call_key",
      [](py::object asks) { deterministic = asks.release().ptr(); },
      "Gives call_key what says whether algorithms must be deterministic; after bind_torch.");
  static PyMethodDef method{
      "call_key", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_key)),
      METH_FASTCALL,
      "A call's arguments as a number, odd when gradients are wanted; None: no ordinary call."};
  m.attr("call_key") = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, nullptr, nullptr));
}

}  // namespace fastllm

#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace fastllm {

constexpr int64_t kUnpooled = 2 << 20;  // bytes of a result: more of them need a pool's memory
constexpr int kMostDims = 8;

inline PyObject* declined() { return Py_NewRef(Py_None); }

inline PyObject* wrong_count(int expected, Py_ssize_t found) {
  return PyErr_Format(PyExc_TypeError, "expected %d arguments, found %zd", expected, found);
}

template <PyObject* (*F)(PyObject*, PyObject* const*, Py_ssize_t)>
void def_fast(pybind11::module_& m, const char* name, const char* arguments) {
  static PyMethodDef method{};
  method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(F)), METH_FASTCALL,
            arguments};
  m.attr(name) =
      pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&method, nullptr, nullptr));
}

// Adds the fast_* functions to the module.
void def_fast_calls(pybind11::module_& m);
// fast_quant_linear.
void def_fast_quant(pybind11::module_& m);

}  // namespace fastllm

// Kernel entries as Python functions on raw pointers, passed as integers (0: none).
#pragma once
#include <pybind11/pybind11.h>

#include <new>
#include <tuple>
#include <type_traits>
#include <utility>

namespace fastllm::bindings {

namespace py = pybind11;

using ptr = uintptr_t;

template <class T>
T convert(PyObject* value) {
  if constexpr (std::is_floating_point_v<T>)
    return static_cast<T>(PyFloat_AsDouble(value));
  else if constexpr (std::is_same_v<T, ptr>)
    return PyLong_AsUnsignedLongLong(value);
  else
    return static_cast<T>(PyLong_AsLongLong(value));
}

// A kernel entry as a plain CPython function: pybind11's own dispatch costs 0.6 us more a call, as
// much as a small norm. Wrong arguments are a TypeError or an OverflowError; the GIL is released
// while the kernel runs.
template <auto F, class... A, size_t... I>
PyObject* call(void (*)(A...), std::index_sequence<I...>, PyObject* const* args, Py_ssize_t count) {
  if (count != Py_ssize_t(sizeof...(A)))
    return PyErr_Format(PyExc_TypeError, "expected %zu arguments, found %zd", sizeof...(A), count);
  const std::tuple<A...> values{convert<A>(args[I])...};
  if (PyErr_Occurred()) return nullptr;
  bool enough_memory = true;
  Py_BEGIN_ALLOW_THREADS;
  try {
    F(std::get<I>(values)...);
  } catch (const std::bad_alloc&) {
    enough_memory = false;
  }
  Py_END_ALLOW_THREADS;
  if (!enough_memory) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

template <auto F, class... A>
PyObject* call(void (*f)(A...), PyObject* const* args, Py_ssize_t count) {
  return call<F>(f, std::index_sequence_for<A...>{}, args, count);
}

template <auto F>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call<F>(F, args, count);
}

template <auto F>
void def_kernel(py::module_& m, const char* name, const char* arguments) {
  static PyMethodDef method{};
  method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<F>)),
            METH_FASTCALL, arguments};
  m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, nullptr, nullptr));
}

template <class T = void>
T* at(ptr p) {
  return reinterpret_cast<T*>(p);
}

// One for each family, in <family>.cpp; module.cpp calls them.
void bind_gemm(py::module_& m);
void bind_norm(py::module_& m);
void bind_activation(py::module_& m);
void bind_optim(py::module_& m);
void bind_loss(py::module_& m);
void bind_softmax(py::module_& m);
void bind_dropout(py::module_& m);
void bind_embedding(py::module_& m);
void bind_quant(py::module_& m);
void bind_rotary(py::module_& m);
void bind_attention(py::module_& m);
void bind_qgemm(py::module_& m);
void bind_sparse(py::module_& m);
void bind_peak(py::module_& m);

}  // namespace fastllm::bindings

// fastllm._C: one thin binding a kernel entry, on raw pointers passed as integers (0: none).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/pool.h"
#include "call_key.h"
#include "fast_call.h"

namespace py = pybind11;

namespace {

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

void rms_norm_fwd(int dtype, int weight_dtype, ptr input, ptr residual, ptr weight, ptr output,
                  ptr new_residual, int64_t rows, int64_t cols, double eps, float weight_offset,
                  int threads) {
  fastllm::kernels().rms_norm_fwd({dtype, weight_dtype, at(input), at(residual), at(weight),
                                   nullptr, at(output), at(new_residual), rows, cols, eps,
                                   weight_offset, threads});
}

void layer_norm_fwd(int dtype, int weight_dtype, ptr input, ptr residual, ptr weight, ptr bias,
                    ptr output, ptr new_residual, int64_t rows, int64_t cols, double eps,
                    float weight_offset, int threads) {
  fastllm::kernels().layer_norm_fwd({dtype, weight_dtype, at(input), at(residual), at(weight),
                                     at(bias), at(output), at(new_residual), rows, cols, eps,
                                     weight_offset, threads});
}

void rms_norm_bwd(int dtype, int weight_dtype, ptr grad_output, ptr grad_new_residual, ptr input,
                  ptr weight, ptr grad_input, ptr grad_weight, int64_t rows, int64_t cols,
                  double eps, float weight_offset, int threads) {
  fastllm::kernels().rms_norm_bwd({dtype, weight_dtype, at(grad_output), at(grad_new_residual),
                                   at(input), at(weight), at(grad_input), at(grad_weight), nullptr,
                                   rows, cols, eps, weight_offset, threads});
}

void layer_norm_bwd(int dtype, int weight_dtype, ptr grad_output, ptr grad_new_residual, ptr input,
                    ptr weight, ptr grad_input, ptr grad_weight, ptr grad_bias, int64_t rows,
                    int64_t cols, double eps, float weight_offset, int threads) {
  fastllm::kernels().layer_norm_bwd({dtype, weight_dtype, at(grad_output), at(grad_new_residual),
                                     at(input), at(weight), at(grad_input), at(grad_weight),
                                     at(grad_bias), rows, cols, eps, weight_offset, threads});
}

void group_norm_fwd(int dtype, int weight_dtype, ptr input, ptr weight, ptr bias, ptr output,
                    int64_t batch, int64_t channels, int64_t groups, int64_t spatial, double eps,
                    int threads) {
  fastllm::kernels().group_norm_fwd({dtype, weight_dtype, at(input), at(weight), at(bias),
                                     at(output), batch, channels, groups, spatial, eps, threads});
}

void group_norm_bwd(int dtype, int weight_dtype, ptr grad_output, ptr input, ptr weight,
                    ptr grad_input, ptr grad_weight, ptr grad_bias, int64_t batch, int64_t channels,
                    int64_t groups, int64_t spatial, double eps, int threads) {
  fastllm::kernels().group_norm_bwd({dtype, weight_dtype, at(grad_output), at(input), at(weight),
                                     at(grad_input), at(grad_weight), at(grad_bias), batch,
                                     channels, groups, spatial, eps, threads});
}

// Runs when the capsule dies: a consumer that took the tensor over has renamed it.
void drop_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor"))
    fastllm::pool_return(
        static_cast<fastllm::LentTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
}

py::object pool_empty_tensor(int type_code, int bits, const std::vector<int64_t>& shape) {
  fastllm::LentTensor* tensor;
  {
    py::gil_scoped_release no_gil;
    tensor = fastllm::pool_lend(type_code, bits, shape.data(), int(shape.size()));
  }
  PyObject* capsule = PyCapsule_New(tensor, "dltensor", drop_capsule);
  if (!capsule) {
    fastllm::pool_return(tensor);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(capsule);
}

py::dict pool_stats() {
  const fastllm::PoolStats s = fastllm::pool_stats();
  py::dict out;
  out["limit"] = s.limit;
  out["idle_bytes"] = s.idle_bytes;
  out["idle_blocks"] = s.idle_blocks;
  out["live_bytes"] = s.live_bytes;
  out["live_blocks"] = s.live_blocks;
  out["reused"] = s.reused;
  out["allocated"] = s.allocated;
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels on raw pointers; dtype codes: 0 float32, 1 bfloat16, 2 float16.";
  fastllm::guard_fork();
  fastllm::init_isa();
  fastllm::def_fast_calls(m);
  fastllm::def_call_key(m);

  def_kernel<rms_norm_fwd>(m, "rms_norm_fwd",
                           "dtype, weight_dtype, input, residual, weight, output, new_residual, "
                           "rows, cols, eps, weight_offset, threads");
  def_kernel<layer_norm_fwd>(m, "layer_norm_fwd",
                             "dtype, weight_dtype, input, residual, weight, bias, output, "
                             "new_residual, rows, cols, eps, weight_offset, threads");
  def_kernel<rms_norm_bwd>(m, "rms_norm_bwd",
                           "dtype, weight_dtype, grad_output, grad_new_residual, input, weight, "
                           "grad_input, grad_weight, rows, cols, eps, weight_offset, threads");
  def_kernel<layer_norm_bwd>(m, "layer_norm_bwd",
                             "dtype, weight_dtype, grad_output, grad_new_residual, input, weight, "
                             "grad_input, grad_weight, grad_bias, rows, cols, eps, weight_offset, "
                             "threads");
  def_kernel<group_norm_fwd>(m, "group_norm_fwd",
                             "dtype, weight_dtype, input, weight, bias, output, batch, channels, "
                             "groups, spatial, eps, threads");
  def_kernel<group_norm_bwd>(m, "group_norm_bwd",
                             "dtype, weight_dtype, grad_output, input, weight, grad_input, "
                             "grad_weight, grad_bias, batch, channels, groups, spatial, eps, "
                             "threads");

  m.def("isa", &fastllm::isa, "The level of the kernels in use.");
  m.def("isa_levels", &fastllm::isa_levels, "The levels that this machine can run, best last.");
  m.def("set_isa", &fastllm::set_isa, py::arg("name"), "Use another level from now on.");

  using no_gil = py::call_guard<py::gil_scoped_release>;
  m.def("pool_empty_tensor", &pool_empty_tensor, py::arg("type_code"), py::arg("bits"),
        py::arg("shape"), "A DLPack capsule of a new tensor whose memory comes from the pool.");
  m.def("pool_set_limit", &fastllm::pool_set_limit, py::arg("bytes"), no_gil(),
        "How many bytes may lie idle.");
  m.def("pool_empty", &fastllm::pool_empty, no_gil(), "Frees all idle blocks.");
  m.def("pool_stats", &pool_stats, "Counters of the pool.");
}

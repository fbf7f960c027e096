// fastllm._C: one thin binding a kernel entry, on raw pointers passed as integers (0: none).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace {

using ptr = uintptr_t;

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels on raw pointers; dtype codes: 0 float32, 1 bfloat16, 2 float16.";
  fastllm::guard_fork();
  fastllm::init_isa();

  using no_gil = py::call_guard<py::gil_scoped_release>;
  m.def("rms_norm_fwd", &rms_norm_fwd, no_gil());
  m.def("layer_norm_fwd", &layer_norm_fwd, no_gil());
  m.def("rms_norm_bwd", &rms_norm_bwd, no_gil());
  m.def("layer_norm_bwd", &layer_norm_bwd, no_gil());
  m.def("group_norm_fwd", &group_norm_fwd, no_gil());
  m.def("group_norm_bwd", &group_norm_bwd, no_gil());

  m.def("isa", &fastllm::isa, "The level of the kernels in use.");
  m.def("isa_levels", &fastllm::isa_levels, "The levels that this machine can run, best last.");
  m.def("set_isa", &fastllm::set_isa, py::arg("name"), "Use another level from now on.");
}

// The norm family in Python.
#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/kernels/norm.h"

namespace fastllm::norm {
FASTLLM_LEVELS
}  // namespace fastllm::norm

namespace fastllm::bindings {
namespace {

void rms_norm_fwd(int dtype, int weight_dtype, ptr input, ptr residual, ptr weight, ptr output,
                  ptr new_residual, int64_t rows, int64_t cols, double eps, float weight_offset,
                  int threads) {
  norm::kernels().rms_norm_fwd({dtype, weight_dtype, at(input), at(residual), at(weight),
                                   nullptr, at(output), at(new_residual), rows, cols, eps,
                                   weight_offset, threads});
}

void layer_norm_fwd(int dtype, int weight_dtype, ptr input, ptr residual, ptr weight, ptr bias,
                    ptr output, ptr new_residual, int64_t rows, int64_t cols, double eps,
                    float weight_offset, int threads) {
  norm::kernels().layer_norm_fwd({dtype, weight_dtype, at(input), at(residual), at(weight),
                                     at(bias), at(output), at(new_residual), rows, cols, eps,
                                     weight_offset, threads});
}

void rms_norm_bwd(int dtype, int weight_dtype, ptr grad_output, ptr grad_new_residual, ptr input,
                  ptr weight, ptr grad_input, ptr grad_weight, int64_t rows, int64_t cols,
                  double eps, float weight_offset, int threads) {
  norm::kernels().rms_norm_bwd({dtype, weight_dtype, at(grad_output), at(grad_new_residual),
                                   at(input), at(weight), at(grad_input), at(grad_weight), nullptr,
                                   rows, cols, eps, weight_offset, threads});
}

void layer_norm_bwd(int dtype, int weight_dtype, ptr grad_output, ptr grad_new_residual, ptr input,
                    ptr weight, ptr grad_input, ptr grad_weight, ptr grad_bias, int64_t rows,
                    int64_t cols, double eps, float weight_offset, int threads) {
  norm::kernels().layer_norm_bwd({dtype, weight_dtype, at(grad_output), at(grad_new_residual),
                                     at(input), at(weight), at(grad_input), at(grad_weight),
                                     at(grad_bias), rows, cols, eps, weight_offset, threads});
}

void group_norm_fwd(int dtype, int weight_dtype, ptr input, ptr weight, ptr bias, ptr output,
                    int64_t batch, int64_t channels, int64_t groups, int64_t spatial, double eps,
                    int threads) {
  norm::kernels().group_norm_fwd({dtype, weight_dtype, at(input), at(weight), at(bias),
                                     at(output), batch, channels, groups, spatial, eps, threads});
}

void group_norm_bwd(int dtype, int weight_dtype, ptr grad_output, ptr input, ptr weight,
                    ptr grad_input, ptr grad_weight, ptr grad_bias, int64_t batch, int64_t channels,
                    int64_t groups, int64_t spatial, double eps, int threads) {
  norm::kernels().group_norm_bwd({dtype, weight_dtype, at(grad_output), at(input), at(weight),
                                     at(grad_input), at(grad_weight), at(grad_bias), batch,
                                     channels, groups, spatial, eps, threads});
}

}  // namespace

void bind_norm(py::module_& m) {
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
}

}  // namespace fastllm::bindings

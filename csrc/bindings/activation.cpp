// The activation family in Python.
#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/kernels/activation.h"

namespace fastllm::activation {
FASTLLM_LEVELS
}  // namespace fastllm::activation

namespace fastllm::bindings {
namespace {

void activation_fwd(int dtype, int function, ptr input, ptr up, ptr output, int64_t rows,
                    int64_t cols, int64_t input_stride, int64_t up_stride, int threads) {
  activation::kernels().forward({dtype, function, at(input), at(up), at(output), rows, cols,
                                 input_stride, up_stride, threads});
}

void activation_bwd(int dtype, int function, ptr grad_output, ptr input, ptr up, ptr grad_input,
                    ptr grad_up, int64_t rows, int64_t cols, int64_t grad_stride,
                    int64_t input_stride, int64_t up_stride, int threads) {
  activation::kernels().backward({dtype, function, at(grad_output), at(input), at(up),
                                  at(grad_input), at(grad_up), rows, cols, grad_stride,
                                  input_stride, up_stride, threads});
}

}  // namespace

void bind_activation(py::module_& m) {
  def_kernel<activation_fwd>(m, "activation_fwd",
                             "dtype, function, input, up, output, rows, cols, input_stride, "
                             "up_stride, threads");
  def_kernel<activation_bwd>(m, "activation_bwd",
                             "dtype, function, grad_output, input, up, grad_input, grad_up, rows, "
                             "cols, grad_stride, input_stride, up_stride, threads");
}

}  // namespace fastllm::bindings

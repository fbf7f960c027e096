// softmax and log_softmax in Python.
#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/kernels/softmax.h"

namespace fastllm::softmax {
FASTLLM_LEVELS
}  // namespace fastllm::softmax

namespace fastllm::bindings {
namespace {

void softmax_fwd(int dtype, ptr input, ptr output, int64_t outer, int64_t n, int64_t inner, int log,
                 int threads) {
  softmax::kernels().softmax_fwd({dtype, at(input), at(output), outer, n, inner, log != 0, threads});
}

void softmax_bwd(int dtype, ptr grad_output, ptr output, ptr grad_input, int64_t outer, int64_t n,
                 int64_t inner, int log, int threads) {
  softmax::kernels().softmax_bwd({dtype, at(grad_output), at(output), at(grad_input), outer, n,
                                  inner, log != 0, threads});
}

}  // namespace

void bind_softmax(py::module_& m) {
  def_kernel<softmax_fwd>(m, "softmax_fwd", "dtype, input, output, outer, n, inner, log, threads");
  def_kernel<softmax_bwd>(m, "softmax_bwd",
                          "dtype, grad_output, output, grad_input, outer, n, inner, log, threads");
}

}  // namespace fastllm::bindings

// The dropout family in Python.
#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/kernels/dropout.h"

namespace fastllm::dropout {
FASTLLM_LEVELS
}  // namespace fastllm::dropout

namespace fastllm::bindings {
namespace {

void dropout(int dtype, ptr input, ptr residual, ptr output, int64_t n, double p, int64_t seed,
             int threads) {
  dropout::kernels().apply({dtype, at(input), at(residual), at(output), n, p, seed, threads});
}

}  // namespace

void bind_dropout(py::module_& m) {
  def_kernel<dropout>(m, "dropout", "dtype, input, residual, output, n, p, seed, threads");
}

}  // namespace fastllm::bindings

// Products with weights of which two of every four are kept, in Python.
#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/kernels/sparse.h"

namespace fastllm::sparse {
FASTLLM_DOT_LEVELS
}  // namespace fastllm::sparse

namespace fastllm::bindings {
namespace {

void sparse_matmul(int x_dtype, int dtype, ptr x, ptr x_scales, int64_t m, int64_t x_row,
                   int w_dtype, ptr values, ptr kept, ptr scales, int64_t n, int64_t k, ptr bias,
                   ptr out, int threads) {
  sparse::kernels().multiply({x_dtype, dtype, at(x), at<const float>(x_scales), m, x_row,
                              {w_dtype, at(values), at<const uint8_t>(kept),
                               at<const float>(scales), n, k},
                              at(bias), at(out), threads});
}

void sparse_expand(int dtype, ptr values, ptr kept, int64_t n, int64_t k, ptr out, int threads) {
  sparse::kernels().expand({{dtype, at(values), at<const uint8_t>(kept), nullptr, n, k}, at(out),
                            threads});
}

}  // namespace

void bind_sparse(py::module_& m) {
  def_kernel<sparse_matmul>(m, "sparse_matmul",
                            "x_dtype, dtype, x, x_scales, m, x_row, w_dtype, values, kept, scales, "
                            "n, k, bias, out, threads");
  def_kernel<sparse_expand>(m, "sparse_expand", "dtype, values, kept, n, k, out, threads");
}

}  // namespace fastllm::bindings

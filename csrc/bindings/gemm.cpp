// The gemm family in Python.
#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/kernels/gemm.h"

namespace fastllm::gemm {
FASTLLM_DOT_LEVELS
}  // namespace fastllm::gemm

namespace fastllm::bindings {
namespace {

void gemm(int dtype, int out_dtype, int64_t batch, int64_t m, int64_t n, int64_t k, ptr a,
          int64_t a_row, int64_t a_col, int64_t a_batch, ptr b, int64_t b_row, int64_t b_col,
          int64_t b_batch, ptr b2, int64_t b2_row, int64_t b2_col, ptr packed, ptr packed2,
          ptr bias, ptr residual, ptr out, ptr pre, ptr pre2, int activation, float scale,
          int accumulate, int block_rows, int threads) {
  gemm::kernels().multiply({dtype, out_dtype, batch, m, n, k,
                            {at(a), a_row, a_col, a_batch},
                            {at(b), b_row, b_col, b_batch},
                            {at(b2), b2_row, b2_col, 0},
                            at(packed), at(packed2), at(bias), at(residual), at(out), at(pre),
                            at(pre2), n, m * n, activation, scale, accumulate,
                            block_rows, threads});
}

void gemm_groups(int dtype, int64_t m, int64_t n, int64_t k, ptr a, int64_t a_row, int64_t a_col,
                 ptr b, int64_t b_row, int64_t b_col, int64_t b_batch, ptr bias, ptr out, ptr ends,
                 int64_t count, int inner, int threads) {
  gemm::Product each{};
  each.dtype = each.out_dtype = dtype;
  each.m = m, each.n = n, each.k = k;
  each.a = {at(a), a_row, a_col, 0};
  each.b = {at(b), b_row, b_col, b_batch};
  each.bias = at(bias), each.out = at(out);
  each.out_row = n, each.out_batch = m * n;
  each.scale = 1, each.threads = threads;
  gemm::kernels().multiply_groups({each, (const int32_t*)at(ends), count, inner});
}

void gemm_pack(int dtype, ptr b, int64_t b_row, int64_t b_col, int64_t n, int64_t k, ptr packed,
               int threads) {
  gemm::kernels().pack(dtype, {at(b), b_row, b_col, 0}, n, k, at(packed), threads);
}

void activation_backward(int dtype, int activation, ptr grad, ptr pre, ptr up, ptr more_pre,
                         ptr more_up, ptr grad_pre, ptr grad_up, int64_t size, int threads) {
  gemm::kernels().activation_backward({dtype, activation, at(grad), at(pre), at(up), at(more_pre),
                                       at(more_up), at(grad_pre), at(grad_up), size, threads});
}

void row_sum(int dtype, ptr x, ptr sums, int64_t m, int64_t n, int threads) {
  gemm::kernels().row_sum({dtype, at(x), at(sums), m, n, threads});
}

}  // namespace

void bind_gemm(py::module_& m) {
  def_kernel<gemm>(m, "gemm",
                   "dtype, out_dtype, batch, m, n, k, a, a_row, a_col, a_batch, b, b_row, b_col, "
                   "b_batch, b2, b2_row, b2_col, packed, packed2, bias, residual, out, pre, pre2, "
                   "activation, scale, accumulate, block_rows, threads");
  def_kernel<gemm_groups>(m, "gemm_groups",
                          "dtype, m, n, k, a, a_row, a_col, b, b_row, b_col, b_batch, bias, out, "
                          "ends, count, inner, threads");
  def_kernel<gemm_pack>(m, "gemm_pack", "dtype, b, b_row, b_col, n, k, packed, threads");
  def_kernel<activation_backward>(m, "gemm_activation_backward",
                                  "dtype, activation, grad, pre, up, more_pre, more_up, grad_pre, "
                                  "grad_up, size, threads");
  def_kernel<row_sum>(m, "gemm_row_sum", "dtype, x, sums, m, n, threads");
  m.def("gemm_packed_bytes", [](int dtype, int64_t n, int64_t k) {
    return gemm::kernels().packed_bytes(dtype, n, k);
  }, "Bytes that gemm_pack writes at the level in use.");
}

}  // namespace fastllm::bindings

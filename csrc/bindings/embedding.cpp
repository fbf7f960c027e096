// Embedding in Python.
#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/kernels/embedding.h"

namespace fastllm::embedding {
FASTLLM_LEVELS

namespace {
template <class T>
int64_t outside(const T* indices, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i)
    if (indices[i] < 0 || int64_t(indices[i]) >= rows) return i;
  return -1;
}
}  // namespace

// The place of the first index that is not in [0, rows), or -1.
int64_t first_outside(const Gather& a, int64_t rows) {
  return a.wide ? outside(static_cast<const int64_t*>(a.input), a.count, rows)
                : outside(static_cast<const int32_t*>(a.input), a.count, rows);
}
}  // namespace fastllm::embedding

namespace fastllm::bindings {
namespace {

void embedding_fwd(int wide, ptr input, ptr weight, ptr output, int64_t count, int64_t row_bytes,
                   int64_t weight_step, int threads) {
  embedding::kernels().gather(
      {wide, at(input), at(weight), at(output), count, row_bytes, weight_step, threads});
}

void embedding_bwd(int dtype, int wide, ptr grad_output, ptr input, ptr grad_weight, ptr room,
                   int64_t count, int64_t rows, int64_t cols, int64_t padding_idx,
                   int scale_grad_by_freq, int threads) {
  embedding::kernels().scatter({dtype, wide, at(grad_output), at(input), at(grad_weight),
                                at<int64_t>(room), count, rows, cols, padding_idx,
                                scale_grad_by_freq, threads});
}

}  // namespace

void bind_embedding(py::module_& m) {
  def_kernel<embedding_fwd>(
      m, "embedding_fwd",
      "wide, input, weight, output, count, row_bytes, weight_step, threads");
  def_kernel<embedding_bwd>(m, "embedding_bwd",
                            "dtype, wide, grad_output, input, grad_weight, room, count, rows, "
                            "cols, padding_idx, scale_grad_by_freq, threads");
  m.def(
      "first_outside",
      [](int wide, ptr indices, int64_t count, int64_t rows) {
        embedding::Gather a{};
        a.wide = wide, a.input = at(indices), a.count = count;
        return embedding::first_outside(a, rows);
      },
      "The place of the first index that is not in [0, rows), or -1.");
}

}  // namespace fastllm::bindings

// Rotary position embedding in Python.
#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/kernels/rotary.h"

namespace fastllm::rotary {
FASTLLM_LEVELS
}  // namespace fastllm::rotary

namespace fastllm::bindings {
namespace {

void rotate(int dtype, int table_dtype, ptr input, ptr output, ptr cos, ptr sin, int64_t batch,
            int64_t heads, int64_t length, int64_t dim, int64_t rotary_dim, int64_t width,
            int64_t table_batch, int64_t in_batch, int64_t in_head, int64_t in_row,
            int64_t out_batch, int64_t out_head, int64_t out_row, int interleaved, int transposed,
            int threads) {
  rotary::kernels().rotate({dtype,      table_dtype, at(input),   at(output),  at(cos),
                            at(sin),    batch,       heads,       length,      dim,
                            rotary_dim, width,       table_batch, in_batch,    in_head,
                            in_row,     out_batch,   out_head,    out_row,     interleaved,
                            transposed, threads});
}

}  // namespace

void bind_rotary(py::module_& m) {
  def_kernel<rotate>(m, "rotate",
                     "dtype, table_dtype, input, output, cos, sin, batch, heads, length, dim, "
                     "rotary_dim, width, table_batch, in_batch, in_head, in_row, out_batch, "
                     "out_head, out_row, interleaved, transposed, threads");
}

}  // namespace fastllm::bindings

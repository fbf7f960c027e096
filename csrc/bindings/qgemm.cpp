// The qgemm family in Python.
#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/kernels/qgemm.h"

namespace fastllm::qgemm {
FASTLLM_DOT_LEVELS
}  // namespace fastllm::qgemm

namespace fastllm::bindings {
namespace {

void qgemm(int dtype, int activations, ptr x, int64_t m, int64_t x_row, int kind, ptr codes,
           int64_t n, int64_t k, int64_t row, ptr scales, ptr zeros, int scale_type,
           int64_t scale_row, int64_t scale_block, int64_t group, ptr bias, float act_scale,
           int activation, ptr out, int threads) {
  qgemm::kernels().multiply({dtype, activations, at(x), m, x_row,
                             {kind, at<const uint8_t>(codes), n, k, row, at(scales), at(zeros),
                              scale_type, scale_row, scale_block, group},
                             at(bias), act_scale, activation, at(out), threads});
}

void decode(int dtype, int kind, ptr codes, int64_t n, int64_t k, int64_t row, ptr scales,
            ptr zeros, int scale_type, int64_t scale_row, int64_t scale_block, int64_t group,
            int64_t from, int64_t rows, ptr out, int threads) {
  qgemm::kernels().decode({{kind, at<const uint8_t>(codes), n, k, row, at(scales), at(zeros),
                            scale_type, scale_row, scale_block, group},
                           dtype, from, rows, at(out), threads});
}

void loud(ptr x, int size, int64_t m, int64_t k, int64_t x_row, int64_t limit, ptr places,
          int threads) {
  qgemm::kernels().loud({at(x), size, m, k, x_row, limit, at<int64_t>(places), threads});
}

}  // namespace

void bind_qgemm(py::module_& m) {
  def_kernel<qgemm>(m, "qgemm",
                    "dtype, activations, x, m, x_row, kind, codes, n, k, row, scales, zeros, "
                    "scale_type, scale_row, scale_block, group, bias, act_scale, activation, "
                    "out, threads");
  def_kernel<decode>(m, "qgemm_decode",
                     "dtype, kind, codes, n, k, row, scales, zeros, scale_type, scale_row, "
                     "scale_block, group, from, rows, out, threads");
  def_kernel<loud>(m, "qgemm_loud", "x, size, m, k, x_row, limit, places, threads");
}

}  // namespace fastllm::bindings

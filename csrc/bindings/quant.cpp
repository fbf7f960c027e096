// quantize and dequantize in Python.
#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/kernels/quant.h"

namespace fastllm::quant {
FASTLLM_LEVELS
}  // namespace fastllm::quant

namespace fastllm::bindings {
namespace {

void quantize(int dtype, int kind, ptr input, ptr codes, ptr scales, ptr zeros, int64_t rows,
              int64_t cols, int64_t group, int64_t height, int threads) {
  quant::kernels().quantize({dtype, kind, at(input), at(codes), at(scales), at(zeros),
                             {rows, cols, group, height}, threads});
}

void dequantize(int dtype, int kind, int scale_type, ptr codes, ptr scales, ptr zeros, ptr output,
                int64_t rows, int64_t cols, int64_t group, int64_t height, int threads) {
  quant::kernels().dequantize({dtype, kind, scale_type, at(codes), at(scales), at(zeros),
                               at(output), {rows, cols, group, height}, threads});
}

void encode(int dtype, int kind, int scale_type, ptr input, ptr codes, ptr scales, ptr given,
            int64_t rows, int64_t cols, int64_t group, int64_t height, int threads) {
  quant::kernels().encode({{dtype, kind, at(input), at(codes), at(scales), nullptr,
                            {rows, cols, group, height}, threads},
                           scale_type, at(given)});
}

void fake(int dtype, int kind, int scale_type, ptr input, ptr output, ptr scales, ptr zeros,
          int64_t rows, int64_t cols, int64_t group, int64_t height, int threads) {
  quant::kernels().fake({{dtype, kind, at(input), at(output), at(scales), at(zeros),
                          {rows, cols, group, height}, threads},
                         scale_type});
}

void fake_grad(int dtype, int kind, int scale_type, ptr input, ptr scales, ptr grad, ptr grad_input,
               ptr parts, int64_t rows, int64_t cols, int64_t group, int64_t height, int threads) {
  quant::kernels().fake_grad({dtype, kind, scale_type, at(input), at(scales), at(grad),
                              at(grad_input), at<float>(parts), {rows, cols, group, height},
                              threads});
}

}  // namespace

void bind_quant(py::module_& m) {
  def_kernel<quantize>(m, "quantize",
                       "dtype, kind, input, codes, scales, zeros, rows, cols, group, height, "
                       "threads");
  def_kernel<dequantize>(m, "dequantize",
                         "dtype, kind, scale_type, codes, scales, zeros, output, rows, cols, "
                         "group, height, threads");
  def_kernel<encode>(m, "quant_encode",
                     "dtype, kind, scale_type, input, codes, scales, given, rows, cols, group, "
                     "height, threads");
  def_kernel<fake>(m, "quant_fake",
                   "dtype, kind, scale_type, input, output, scales, zeros, rows, cols, group, "
                   "height, threads");
  def_kernel<fake_grad>(m, "quant_fake_grad",
                        "dtype, kind, scale_type, input, scales, grad, grad_input, parts, rows, "
                        "cols, group, height, threads");
}

}  // namespace fastllm::bindings

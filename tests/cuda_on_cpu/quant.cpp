// The kernels on codes of csrc/cuda, run by the emulator: a C interface for ctypes.
#include "emulator.h"

#include "cuda/quant.cu"

using namespace fastllm;

extern "C" int emulate_gemv(int dtype, const void* x, int64_t m, int64_t x_row, int kind,
                            const void* codes, int64_t n, int64_t k, int64_t row,
                            const void* scales, const void* zeros, int scale_type,
                            int64_t scale_row, int64_t group, const float* table, const void* bias,
                            void* out) {
  const QuantWeight w = {kind, codes, n, k, row, scales, zeros, scale_type, scale_row, group, table};
  return quant_gemv(dtype, {x, m, x_row, w, bias, out}, 0, nullptr);
}

extern "C" int emulate_dequantize(int dtype, int kind, const void* codes, int64_t n, int64_t k,
                                  int64_t row, const void* scales, const void* zeros,
                                  int scale_type, int64_t scale_row, int64_t group,
                                  const float* table, void* out) {
  const QuantWeight w = {kind, codes, n, k, row, scales, zeros, scale_type, scale_row, group, table};
  return quant_dequantize(dtype, w, out, 0, nullptr);
}

extern "C" int emulate_quantize(int dtype, int kind, const void* x, int64_t rows, int64_t k,
                                int64_t group, void* codes, void* scales, void* zeros,
                                const char* thresholds, uint64_t order) {
  Quantize p = {kind, x, rows, k, group, codes, scales, zeros, {}, order};
  if (kind >= kQuantNf4) memcpy(p.thresholds, thresholds, sizeof(p.thresholds));
  return quantize(dtype, p, 0, nullptr);
}

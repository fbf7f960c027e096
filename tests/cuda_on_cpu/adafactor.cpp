// Adafactor's launcher and kernels of csrc/cuda, run by the emulator: a C interface for ctypes.
#include "emulator.h"

#include "cuda/adafactor.cu"

using namespace fastllm;

extern "C" int emulate_adafactor(const void* rows, const void* shares, const void* moments,
                                 int64_t row_count, int64_t share_count, int64_t moment_count,
                                 const float* lengths, const float* factor, const float* found,
                                 float* room, float* out, float* sums, float* sizes, double lr,
                                 double beta2_decay, double least, double d, float sign) {
  const FactorStep p = {static_cast<const FactorRow*>(rows), static_cast<const FactorShare*>(shares),
                        static_cast<const FactorShare*>(moments), row_count, share_count,
                        moment_count, lengths, factor, found, room, out, sums, sizes, lr,
                        beta2_decay, least, d, sign};
  return adafactor_ways(p, 0, nullptr);
}

// The optimizers' launcher and kernels of csrc/cuda, run by the emulator: a C interface for ctypes.
#include "emulator.h"

#include "cuda/optim.cu"

using namespace fastllm;

extern "C" int emulate_optim_step(int kind, const void* rows, const void* shares, int64_t row_count,
                                  int64_t share_count, void* uses, float* squares,
                                  const float* scale, const float* found, float* norm,
                                  float max_norm, const void* settings, int64_t groups,
                                  const void* counts) {
  const OptimStep p = {static_cast<const OptimRow*>(rows), static_cast<const OptimShare*>(shares),
                       row_count, share_count, static_cast<OptimUse*>(uses), squares, scale, found,
                       norm, max_norm};
  return optim_step(kind, p, static_cast<const OptimSettings*>(settings), groups,
                    static_cast<const OptimCount*>(counts), 0, nullptr);
}

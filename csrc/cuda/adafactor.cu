#include "cuda/adafactor.h"

#include "cuda/adafactor.cuh"
#include "cuda/launch.cuh"

namespace fastllm {

int adafactor_ways(const FactorStep& step, int device, void* stream) {
  constexpr int kSums = kFactorThreads / 32 * static_cast<int>(sizeof(float));
  const OnDevice on(device);
  cudaError_t error = on.error;
  const auto run = [&](void (*kernel)(FactorStep), int64_t blocks) {
    if (error != cudaSuccess || blocks == 0) return;
    const dim3 grid(static_cast<unsigned>(blocks));
    error = launch(kernel, grid, kFactorThreads, kSums, stream, 1, step);
  };
  run(factor_squares, step.share_count);
  run(factor_moments, step.moment_count);
  run(factor_directions, step.share_count);
  run(factor_sizes, (step.row_count + kFactorThreads - 1) / kFactorThreads);
  return error;
}

}  // namespace fastllm

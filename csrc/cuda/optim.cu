#include "cuda/optim.h"

#include "cuda/launch.cuh"
#include "cuda/optim.cuh"

namespace fastllm {
namespace {

constexpr int kSums = kOptimThreads / 32 * static_cast<int>(sizeof(float));

cudaError_t update(int kind, const OptimStep& step, int64_t first, int64_t count, void* stream) {
  const dim3 grid(static_cast<unsigned>(count));
  switch (kind) {
    case kOptimAdam:
      return launch(optim_update<kOptimAdam>, grid, kOptimThreads, 0, stream, 1, step, first);
    case kOptimSgd:
    case kOptimAlong:
      return launch(optim_update<kOptimSgd>, grid, kOptimThreads, 0, stream, 1, step, first);
    default:
      return launch(optim_update<kOptimLion>, grid, kOptimThreads, 0, stream, 1, step, first);
  }
}

}  // namespace

int optim_step(int kind, const OptimStep& step, const OptimSettings* settings, int64_t groups,
               const OptimCount* counts, int device, void* stream) {
  const OnDevice on(device);
  if (on.error != cudaSuccess) return on.error;
  if (step.squares && step.share_count) {
    const dim3 grid(static_cast<unsigned>(step.share_count));
    const cudaError_t error = launch(optim_squares, grid, kOptimThreads, kSums, stream, 1, step);
    if (error != cudaSuccess) return error;
  }
  int64_t row = 0, share = 0;
  for (int64_t from = 0; from < groups; from += kOptimGroups, ++counts) {
    OptimAll all = {};
    for (int64_t g = from; g < groups && g < from + kOptimGroups; ++g) all.group[g - from] = settings[g];
    if (counts->rows == 0) continue;
    const dim3 grid(static_cast<unsigned>((counts->rows + kOptimThreads - 1) / kOptimThreads));
    cudaError_t error = launch(optim_prepare, grid, kOptimThreads, kSums, stream, 1, kind, step, all,
                               row, counts->rows);
    if (error == cudaSuccess && counts->shares) error = update(kind, step, share, counts->shares, stream);
    if (error != cudaSuccess) return error;
    row += counts->rows, share += counts->shares;
  }
  return cudaSuccess;
}

}  // namespace fastllm

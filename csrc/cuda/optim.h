// Launchers of the optimizer kernels; they return a cudaError_t.
#pragma once

#include "cuda/optim_params.h"

namespace fastllm {

// One step: squares of the gradients where there is something to clip to, each tensor's
// coefficients and step count, then the update. `settings` are of groups 0, 1, ...; `counts` says how
// many rows and shares the first 32 groups have, the next 32, and so on.
struct OptimCount {
  int64_t rows, shares;
};
int optim_step(int kind, const OptimStep& step, const OptimSettings* settings, int64_t groups,
               const OptimCount* counts, int device, void* stream);

}  // namespace fastllm

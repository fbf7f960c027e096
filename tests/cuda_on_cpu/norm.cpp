// The norm launchers and kernels of csrc/cuda, run by the emulator: a C interface for ctypes.
#include "emulator.h"

#include "cuda/norm_backward.cu"
#include "cuda/norm_forward.cu"

// what the launchers ask of the runtime
extern "C" cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaErrorNoDevice; }
extern "C" const char* cudaGetErrorString(cudaError_t) { return ""; }

using namespace fastllm;

extern "C" int emulate_forward(int center, int dtype, int wide, void* x, void* residual,
                               void* weight, void* bias, void* y, void* h, int64_t rows, int cols,
                               float eps, float offset, int aligned) {
  const Forward p = {x, residual, weight, bias, y, h, rows, cols, eps, offset, wide != 0};
  return norm_fwd(center != 0, dtype, p, aligned != 0, 0, nullptr);
}

// Returns the blocks that shared a row, 0 for rows of any length.
extern "C" int emulate_backward(int center, int dtype, int wide, void* dy, void* dh, void* h,
                                void* weight, void* dx, void* dw, void* db, int64_t rows, int cols,
                                float eps, float offset, int aligned, int processors,
                                int clusters) {
  const BackwardPlan plan =
      make_backward_plan(dtype, rows, cols, aligned != 0, processors, clusters != 0);
  std::vector<float> sums(static_cast<size_t>(2 * plan.programs * cols), NAN);
  std::vector<float> stats(static_cast<size_t>(plan.stats), NAN);
  Backward p = {};
  p.dy = dy, p.dh = dh, p.h = h, p.weight = weight;
  p.dx = dx, p.dw = dw, p.db = db;
  p.dw_sums = dw ? sums.data() : nullptr;
  p.db_sums = db ? sums.data() + plan.programs * cols : nullptr;
  p.stats = stats.data();
  p.rows = rows, p.cols = cols, p.eps = eps, p.offset = offset;
  p.wide = wide != 0, p.cluster = plan.cluster;
  const int error = norm_bwd(center != 0, dtype, p, plan, 0, nullptr);
  return error ? -error : plan.cluster;
}

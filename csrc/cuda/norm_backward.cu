#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/norm.cuh"
#include "cuda/norm.h"

namespace fastllm {
namespace {

constexpr int MAX_THREADS = 512;  // at 128 registers a thread

template <typename T, bool CENTER, int ITEMS>
cudaError_t launch_rows(const Backward& p, const BackwardPlan& plan, void* stream) {
  const int slots = RowSum::bytes(plan.block_rows, plan.threads / 32, plan.cluster);
  const int tile = plan.block_rows > 1 ? p.cols * static_cast<int>(sizeof(float)) : 0;
  const dim3 grid(static_cast<unsigned>(plan.programs * plan.cluster));
  return launch(norm_backward<T, CENTER, ITEMS>, grid, dim3(plan.threads, plan.block_rows),
                std::max(slots, tile), stream, plan.cluster, p);
}

template <typename T, bool CENTER>
cudaError_t launch_any(const Backward& p, const BackwardPlan& plan, void* stream) {
  if (plan.cluster > 0) {
    // as many values a thread in every dtype
    constexpr int FEW = sizeof(T) == 2 ? 1 : 2;
    return plan.items == FEW ? launch_rows<T, CENTER, FEW>(p, plan, stream)
                             : launch_rows<T, CENTER, 2 * FEW>(p, plan, stream);
  }
  cudaError_t error =
      launch(norm_backward_stats<T, CENTER>, dim3(static_cast<unsigned>(p.rows)),
             dim3(plan.threads), RowSum::bytes(1, plan.threads / 32, 1), stream, 1, p);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>((p.cols + 255) / 256), static_cast<unsigned>(plan.programs));
  return launch(norm_backward_tile<T>, grid, dim3(256), 0, stream, 1, p);
}

template <typename T>
cudaError_t launch_backward(bool center, const Backward& p, const BackwardPlan& plan,
                            void* stream) {
  const cudaError_t error = center ? launch_any<T, true>(p, plan, stream)
                                   : launch_any<T, false>(p, plan, stream);
  if (error != cudaSuccess || (!p.dw_sums && !p.db_sums)) return error;
  const dim3 grid(static_cast<unsigned>((p.cols + 31) / 32), 2);
  return launch(norm_add_partials<T>, grid, dim3(32, 32), 32 * 33 * 4, stream, 1, p,
                static_cast<int>(plan.programs));
}

}  // namespace

int plan_backward(int dtype, int64_t rows, int64_t cols, bool aligned, int device,
                  BackwardPlan* plan) {
  int processors = 0, major = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error != cudaSuccess) return error;
  *plan = make_backward_plan(dtype, rows, cols, aligned, processors, major >= 9);
  return 0;
}

BackwardPlan make_backward_plan(int dtype, int64_t rows, int64_t cols, bool aligned,
                                int processors, bool clusters) {
  BackwardPlan plan = {};
  const int size = dtype == 0 ? 4 : 8, few = dtype == 0 ? 2 : 1;
  const int64_t vectors = cols / size;
  // 8 values a thread where 8 warps cover the row, else 16 and, past 8192 values, more blocks
  plan.items = vectors <= 256 * few ? few : 2 * few;
  int64_t cluster = 1;
  while (cluster * plan.items * MAX_THREADS < vectors) cluster *= 2;
  if (aligned && cluster <= (clusters ? 8 : 1)) {
    const int64_t stretch = (vectors + cluster - 1) / cluster;
    plan.cluster = static_cast<int>(cluster);
    plan.threads = static_cast<int>((stretch + 32 * plan.items - 1) / (32 * plan.items) * 32);
    plan.block_rows = cluster > 1 ? 1 : std::max(1, 256 / plan.threads);
    const int64_t blocks = (rows + plan.block_rows - 1) / plan.block_rows;
    const int64_t resident = std::max(1, MAX_THREADS / (plan.threads * plan.block_rows));
    plan.programs = std::min(blocks, std::max<int64_t>(1, processors * resident / cluster));
  } else {
    plan.cluster = 0;
    plan.threads = cols >= 2048 ? 512 : cols >= 512 ? 128 : 32;
    plan.stats = 4 * rows;
    const int64_t stripes = (cols + 255) / 256;
    plan.programs = std::min(rows, (8 * processors + stripes - 1) / stripes);
  }
  return plan;
}

int norm_bwd(bool center, int dtype, const Backward& p, const BackwardPlan& plan, int device,
             void* stream) {
  const OnDevice on(device);
  if (on.error != cudaSuccess) return on.error;
  switch (dtype) {
    case 0:
      return launch_backward<float>(center, p, plan, stream);
    case 1:
      return launch_backward<__nv_bfloat16>(center, p, plan, stream);
    default:
      return launch_backward<__half>(center, p, plan, stream);
  }
}

}  // namespace fastllm

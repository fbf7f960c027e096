#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/norm.cuh"
#include "cuda/norm.h"

namespace fastllm {
namespace {

template <typename T, bool CENTER, int ITEMS>
cudaError_t launch_rows(const Forward& p, void* stream) {
  const int vectors = p.cols / Pack<T>::size;
  const int threads = (vectors + 32 * ITEMS - 1) / (32 * ITEMS) * 32;
  const int rows = std::max(1, 128 / threads);
  const dim3 grid(static_cast<unsigned>((p.rows + rows - 1) / rows));
  return launch(norm_forward<T, CENTER, ITEMS>, grid, dim3(threads, rows),
                RowSum::bytes(rows, threads / 32, 1), stream, 1, p);
}

template <typename T, bool CENTER>
cudaError_t launch_forward(const Forward& p, bool aligned, void* stream) {
  const int vectors = p.cols / Pack<T>::size;
  if (aligned && vectors <= 8 * 512) {
    // 64 bytes a thread keep memory busy; fewer where a warp already covers the row
    if (vectors <= 32) return launch_rows<T, CENTER, 1>(p, stream);
    if (vectors <= 64) return launch_rows<T, CENTER, 2>(p, stream);
    if (vectors <= 4 * 512) return launch_rows<T, CENTER, 4>(p, stream);
    return launch_rows<T, CENTER, 8>(p, stream);
  }
  const int threads = p.cols >= 2048 ? 512 : p.cols >= 512 ? 128 : 32;
  return launch(norm_forward_long<T, CENTER>, dim3(static_cast<unsigned>(p.rows)), dim3(threads),
                RowSum::bytes(1, threads / 32, 1), stream, 1, p);
}

template <typename T>
cudaError_t launch_forward(bool center, const Forward& p, bool aligned, void* stream) {
  return center ? launch_forward<T, true>(p, aligned, stream)
                : launch_forward<T, false>(p, aligned, stream);
}

}  // namespace

int norm_fwd(bool center, int dtype, const Forward& p, bool aligned, int device, void* stream) {
  const OnDevice on(device);
  if (on.error != cudaSuccess) return on.error;
  switch (dtype) {
    case 0:
      return launch_forward<float>(center, p, aligned, stream);
    case 1:
      return launch_forward<__nv_bfloat16>(center, p, aligned, stream);
    default:
      return launch_forward<__half>(center, p, aligned, stream);
  }
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fastllm

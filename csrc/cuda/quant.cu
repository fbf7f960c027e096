#include "cuda/quant.h"

#include "cuda/launch.cuh"
#include "cuda/quant.cuh"
#include "cuda/quantize.cuh"

namespace fastllm {
namespace {

// call(type, kind) with a value of the dtype and an integral constant of the kind.
template <int Kind>
struct KindOf {
  static constexpr int value = Kind;
};

template <typename T, typename F>
cudaError_t with_kind(int kind, const F& call) {
  switch (kind) {
    case kQuantInt8: return call(T{}, KindOf<kQuantInt8>{});
    case kQuantInt4: return call(T{}, KindOf<kQuantInt4>{});
    case kQuantNf4: return call(T{}, KindOf<kQuantNf4>{});
    default: return call(T{}, KindOf<kQuantFp4>{});
  }
}

template <typename F>
cudaError_t with_types(int dtype, int kind, const F& call) {
  switch (dtype) {
    case 0: return with_kind<float>(kind, call);
    case 1: return with_kind<__nv_bfloat16>(kind, call);
    default: return with_kind<__half>(kind, call);
  }
}

template <typename T, int Kind, int M>
cudaError_t gemv(const QuantProduct& p, int64_t first, int64_t groups, void* stream) {
  const dim3 grid(static_cast<unsigned>((p.w.n + kQuantWarps - 1) / kQuantWarps),
                  static_cast<unsigned>(groups));
  return launch(gemv_kernel<T, Kind, M>, grid, dim3(32, kQuantWarps), 0, stream, 1, p, first);
}

}  // namespace

int quant_gemv(int dtype, const QuantProduct& p, int device, void* stream) {
  const OnDevice on(device);
  if (on.error != cudaSuccess) return on.error;
  return with_types(dtype, p.w.kind, [&](auto type, auto kind) {
    using T = decltype(type);
    constexpr int K = decltype(kind)::value;
    const int64_t whole = p.m / kQuantTokens * kQuantTokens;
    cudaError_t error = cudaSuccess;
    if (whole) error = gemv<T, K, kQuantTokens>(p, 0, whole / kQuantTokens, stream);
    if (error == cudaSuccess && p.m > whole) error = gemv<T, K, 1>(p, whole, p.m - whole, stream);
    return error;
  });
}

int quant_dequantize(int dtype, const QuantWeight& w, void* out, int device, void* stream) {
  const OnDevice on(device);
  if (on.error != cudaSuccess) return on.error;
  return with_types(dtype, w.kind, [&](auto type, auto kind) {
    using T = decltype(type);
    constexpr int K = decltype(kind)::value;
    constexpr int kThreads = 32 * kQuantWarps;
    const int64_t pieces = w.n * (w.k / Codes<K>::count);
    const dim3 grid(static_cast<unsigned>((pieces + kThreads - 1) / kThreads));
    return launch(dequantize_kernel<T, K>, grid, dim3(kThreads), 0, stream, 1, w,
                  static_cast<T*>(out));
  });
}

int quantize(int dtype, const Quantize& given, int device, void* stream) {
  const OnDevice on(device);
  if (on.error != cudaSuccess) return on.error;
  Quantize p = given;
  if (p.k % p.group == 0) {  // groups that follow each other are rows, and nothing is divided
    p.rows *= p.k / p.group;
    p.k = p.group;
  }
  const int64_t across = (p.k + p.group - 1) / p.group, stretches = p.group / kQuantStep;
  int team = kQuantBlock;  // more than a warp's registers hold: a whole block
  if (stretches <= 32 * kQuantHeld) {
    for (team = 1; team < 32 && team < stretches;) team *= 2;
  }
  const int teams = team == kQuantBlock ? 1 : kQuantBlock / 2 / team;
  const dim3 grid(static_cast<unsigned>((p.rows * across + teams - 1) / teams));
  const int shared = kQuantBlock / 32 * 2 * static_cast<int>(sizeof(int32_t));
  return with_types(dtype, p.kind, [&](auto type, auto kind) {
    using T = decltype(type);
    constexpr int K = decltype(kind)::value;
    return launch(quantize_kernel<T, K>, grid, dim3(team, teams), shared, stream, 1, p, across);
  });
}

}  // namespace fastllm

// The multi-tensor optimizer kernels; formulas in optim_math.h.
#pragma once

#include "cuda/optim_math.h"
#include "cuda/vector.cuh"

namespace fastllm {

constexpr int kOptimThreads = 256;
constexpr int kLane = static_cast<int>(kScaled) / 32;  // elements of a thread: a warp has a scale's

struct OptimAll {
  OptimSettings group[kOptimGroups];
};

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

// Up to four elements as floats, zeros past `count`.
template <typename T>
__device__ __forceinline__ void load_four(const void* from, int64_t at, int count, bool whole,
                                          float (&out)[kLane]) {
  const T* p = static_cast<const T*>(from) + at;
  if (whole) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(p);
#pragma unroll
    for (int j = 0; j < kLane; ++j) out[j] = to_float(four.value[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kLane; ++j) out[j] = j < count ? to_float(p[j]) : 0.0f;
  }
}
template <typename T>
__device__ __forceinline__ void store_four(void* to, int64_t at, int count, bool whole,
                                           const T (&in)[kLane]) {
  T* p = static_cast<T*>(to) + at;
  if (whole) {
    Four<T> four;
#pragma unroll
    for (int j = 0; j < kLane; ++j) four.value[j] = in[j];
    *reinterpret_cast<Four<T>*>(p) = four;
  } else {
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      if (j < count) p[j] = in[j];
    }
  }
}
template <typename T>
__device__ __forceinline__ void round_four(void* to, int64_t at, int count, bool whole,
                                           const float (&in)[kLane]) {
  T out[kLane];
#pragma unroll
  for (int j = 0; j < kLane; ++j) out[j] = from_float<T>(in[j]);
  store_four<T>(to, at, count, whole, out);
}

// What one thread has of one tensor: `count` elements from `at` on.
struct OptimSpot {
  int64_t at;
  int count;
  bool whole;  // all four, at a multiple of their size

  __device__ __forceinline__ void load(int type, const void* from, float (&out)[kLane]) const {
    if (type == 0) {
      load_four<float>(from, at, count, whole, out);
    } else if (type == 1) {
      load_four<__nv_bfloat16>(from, at, count, whole, out);
    } else {
      load_four<__half>(from, at, count, whole, out);
    }
  }
  __device__ __forceinline__ void round(int type, void* to, const float (&in)[kLane]) const {
    if (type == 0) {
      round_four<float>(to, at, count, whole, in);
    } else if (type == 1) {
      round_four<__nv_bfloat16>(to, at, count, whole, in);
    } else {
      round_four<__half>(to, at, count, whole, in);
    }
  }
  // bfloat16, up or down at random.
  __device__ __forceinline__ void round_randomly(void* to, uint32_t key,
                                                 const float (&in)[kLane]) const {
    const uint32_t group = group_bits(key, at);
    uint16_t out[kLane];
#pragma unroll
    for (int j = 0; j < kLane; ++j) out[j] = half_bits(in[j], group ^ place_bits(at + j));
    store_four<uint16_t>(to, at, count, whole, out);
  }
  __device__ __forceinline__ void load_state(int store, const void* from, const float* scales,
                                             float (&out)[kLane]) const {
    if (store <= kHalf) return load(store, from, out);
    if (count == 0) return;
    uint8_t codes[kLane];
    const uint8_t* p = static_cast<const uint8_t*>(from) + at;
    if (whole) {
      const Four<uint8_t> four = *reinterpret_cast<const Four<uint8_t>*>(p);
#pragma unroll
      for (int j = 0; j < kLane; ++j) codes[j] = four.value[j];
    } else {
#pragma unroll
      for (int j = 0; j < kLane; ++j) codes[j] = j < count ? p[j] : 0;
    }
    const float unit = scales[at / kScaled] * (1.0f / unit_of(store));
#pragma unroll
    for (int j = 0; j < kLane; ++j) out[j] = j < count ? decoded(store, codes[j]) * unit : 0.0f;
  }
  // Every thread of the warp takes part: together they have what shares a scale.
  __device__ __forceinline__ void store_state(int store, void* to, float* scales, uint32_t key,
                                              uint32_t half_key, const float (&in)[kLane]) const {
    if (store == kPlain) return round(0, to, in);
    if (store == kHalf) return round_randomly(to, half_key, in);
    uint32_t top = 0;
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      const uint32_t size = j < count ? bits_of(in[j]) & 0x7fffffffu : 0;
      top = size > top ? size : top;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const uint32_t other = bits_of(__shfl_xor_sync(0xffffffffu, float_of(top), step));
      top = other > top ? other : top;
    }
    if (count == 0) return;
    const float scale = scale_of(store, top), factor = factor_of(store, scale);
    const bool usable = is_usable(scale);
    uint32_t group = group_bits(key, at);
    if (store == kOctaves || store == kFp8Square) group = mixed(group);
    uint8_t codes[kLane];
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      const uint32_t random = group ^ place_bits(at + j);
      codes[j] = static_cast<uint8_t>(encoded(store, in[j], factor, usable, random));
    }
    store_four<uint8_t>(to, at, count, whole, codes);
    if (at % kScaled == 0) scales[at / kScaled] = scale;
  }
};

__device__ __forceinline__ int byte_of(int64_t types, int place) {
  return static_cast<int>(types >> (8 * place) & 0xff);
}
__device__ __forceinline__ bool is_found(const OptimStep& p) {
  return p.found != nullptr && *p.found != 0.0f;
}

// Each block owns one share: its warps take 128 elements of it in turn.
template <int KIND>
__global__ void __launch_bounds__(kOptimThreads) optim_update(OptimStep p, int64_t first_share) {
  if (is_found(p)) return;
  const OptimShare share = p.shares[first_share + blockIdx.x];
  const OptimRow& row = p.rows[share.row];
  const OptimUse use = p.uses[share.row];
  const int64_t types = row.types, end = min(row.n, share.first + kOptimPiece);
  const int type = byte_of(types, 0), states = row.state[2] ? 3 : row.state[1] ? 2 : row.state[0] ? 1 : 0;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t block = share.first + warp * kScaled; block < end;
       block += kOptimThreads / 32 * kScaled) {
    OptimSpot spot;
    spot.at = block + lane * kLane;
    const int64_t left = end - spot.at;
    spot.count = static_cast<int>(left < 0 ? 0 : left > kLane ? kLane : left);
    spot.whole = spot.count == kLane && byte_of(types, 5) != 0;
    float grad[kLane], param[kLane], state[3][kLane] = {};
    spot.load(byte_of(types, 1), row.grad, grad);
    spot.load(row.master ? 0 : type, row.master ? row.master : row.param, param);
    if (states > 0) spot.load_state(byte_of(types, 2), row.state[0], row.scale[0], state[0]);
    if (states > 1) spot.load_state(byte_of(types, 3), row.state[1], row.scale[1], state[1]);
    if (states > 2) spot.load_state(byte_of(types, 4), row.state[2], nullptr, state[2]);
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      float s[3] = {state[0][j], state[1][j], state[2][j]};
      update<KIND>(use, states, grad[j], param[j], s);
      state[0][j] = s[0], state[1][j] = s[1], state[2][j] = s[2];
    }
    if (states > 0)
      spot.store_state(byte_of(types, 2), row.state[0], row.scale[0], use.key, use.key, state[0]);
    if (states > 1)
      spot.store_state(byte_of(types, 3), row.state[1], row.scale[1], use.key, use.key + 1, state[1]);
    if (states > 2)
      spot.store_state(byte_of(types, 4), row.state[2], nullptr, use.key, use.key + 2, state[2]);
    if (row.master) spot.round(0, row.master, param);
    if (use.stochastic && type == 1 && !row.master) {
      spot.round_randomly(row.param, mixed(use.key), param);
    } else {
      spot.round(type, row.param, param);
    }
  }
}

// Each block writes the sum of the squares of one share's gradients.
__global__ void __launch_bounds__(kOptimThreads) optim_squares(OptimStep p) {
  const OptimShare share = p.shares[blockIdx.x];
  const OptimRow& row = p.rows[share.row];
  const int64_t end = min(row.n, share.first + kOptimPiece);
  float sum = 0.0f;
  for (int64_t at = share.first + threadIdx.x * kLane; at < end; at += kOptimThreads * kLane) {
    OptimSpot spot;
    spot.at = at;
    spot.count = static_cast<int>(end - at > kLane ? kLane : end - at);
    spot.whole = spot.count == kLane && byte_of(row.types, 5) != 0;
    float grad[kLane];
    spot.load(byte_of(row.types, 1), row.grad, grad);
#pragma unroll
    for (int j = 0; j < kLane; ++j) sum += grad[j] * grad[j];
  }
  sum = block_sum<kOptimThreads>(sum);
  if (threadIdx.x == 0) p.squares[blockIdx.x] = sum;
}

// Each thread owns a row: counts its step and works out what its update needs. Each block adds up all
// the squares for itself, in one order.
__global__ void __launch_bounds__(kOptimThreads)
    optim_prepare(int kind, OptimStep p, OptimAll all, int64_t first_row, int64_t row_count) {
  const float scale = p.scale ? *p.scale : 1.0f;
  float factor = 1.0f / scale;
  if (p.squares) {
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < p.share_count; i += kOptimThreads) sum += p.squares[i];
    const float norm = sqrtf(block_sum<kOptimThreads>(sum)) / scale;
    factor = gradient_factor(scale, norm, p.max_norm);
    if (blockIdx.x == 0 && threadIdx.x == 0 && first_row == 0) *p.norm = norm;
  }
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kOptimThreads + threadIdx.x;
  if (i >= row_count || is_found(p)) return;
  const OptimRow& row = p.rows[first_row + i];
  const OptimSettings& s = all.group[row.group % kOptimGroups];
  const bool along = kind == kOptimAlong;
  const float time = row.step ? *row.step + (along ? 0.0f : 1.0f) : 0.0f;
  if (row.step && !along) *row.step = time;
  double lr = s.lr_at ? static_cast<double>(*s.lr_at) : s.lr;
  if (along) lr *= *row.scale[0];
  p.uses[first_row + i] =
      make_use(kind, s, lr, time, row.fresh != 0, factor, static_cast<uint32_t>(row.number));
}

}  // namespace fastllm

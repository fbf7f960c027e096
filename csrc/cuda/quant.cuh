// Codes become numbers in registers: 16 bytes of a row at a time, which one scale is for.
#pragma once

#include "cuda/quant_params.h"
#include "cuda/vector.cuh"

namespace fastllm {

constexpr int kQuantWarps = 4, kQuantTokens = 4;  // rows a block; tokens at once

template <int Kind>
struct Codes {
  static constexpr int count = Kind == kQuantInt8 ? 16 : 32;  // in 16 bytes

  // Code number i of 16 bytes, in units of its scale.
  __device__ __forceinline__ static float number(const Pack<uint32_t>& bytes, int i, float zero,
                                                 const float* table) {
    if (Kind == kQuantInt8) {
      const uint32_t byte = bytes.value[i / 4] >> (i % 4 * 8) & 255u;
      return static_cast<float>(static_cast<int8_t>(byte));
    }
    const uint32_t nibble = bytes.value[i / 8] >> (i % 8 * 4) & 15u;
    if (Kind == kQuantInt4) return static_cast<float>(nibble) - zero;
    return table[nibble];
  }
};

__device__ __forceinline__ float quant_param(const void* p, int type, int64_t at) {
  if (type == 0) return static_cast<const float*>(p)[at];
  if (type == 1) return to_float(static_cast<const __nv_bfloat16*>(p)[at]);
  return to_float(static_cast<const __half*>(p)[at]);
}

// The scale and the zero point of the group that element (row, k) is in.
struct QuantScale {
  float scale, zero;
  __device__ __forceinline__ QuantScale(const QuantWeight& w, int64_t row, int64_t k) {
    const int64_t at = row * w.scale_row + k / w.group;
    scale = quant_param(w.scales, w.scale_type, at);
    zero = w.zeros ? quant_param(w.zeros, w.scale_type, at) : 8.0f;
  }
};

__device__ __forceinline__ Pack<uint32_t> quant_codes(const QuantWeight& w, int64_t row,
                                                      int64_t chunk) {
  const char* line = static_cast<const char*>(w.codes) + row * w.row;
  return load_pack(reinterpret_cast<const uint32_t*>(line) + chunk * 4);
}

// Warp y of block x owns row x * kQuantWarps + y of the weight, tokens from blockIdx.y * M on.
template <typename T, int Kind, int M>
__global__ void __launch_bounds__(32 * kQuantWarps) gemv_kernel(QuantProduct p, int64_t first) {
  using C = Codes<Kind>;
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kQuantWarps + threadIdx.y;
  if (row >= p.w.n) return;  // a whole warp
  const int64_t token = first + static_cast<int64_t>(blockIdx.y) * M;
  const T* x = static_cast<const T*>(p.x) + token * p.x_row;
  float sum[M];
#pragma unroll
  for (int m = 0; m < M; ++m) sum[m] = 0.0f;
  for (int64_t chunk = lane; chunk * C::count < p.w.k; chunk += 32) {
    const Pack<uint32_t> codes = quant_codes(p.w, row, chunk);
    const QuantScale s(p.w, row, chunk * C::count);
    float part[M];
#pragma unroll
    for (int m = 0; m < M; ++m) part[m] = 0.0f;
#pragma unroll
    for (int i = 0; i < C::count; i += Pack<T>::size) {
      float number[Pack<T>::size];
#pragma unroll
      for (int j = 0; j < Pack<T>::size; ++j)
        number[j] = C::number(codes, i + j, s.zero, p.w.table);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const Pack<T> values = load_pack(x + m * p.x_row + chunk * C::count + i);
#pragma unroll
        for (int j = 0; j < Pack<T>::size; ++j)
          part[m] = fmaf(to_float(values.value[j]), number[j], part[m]);
      }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) sum[m] = fmaf(part[m], s.scale, sum[m]);
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum[m] += __shfl_xor_sync(0xffffffffu, sum[m], step);
    if (lane == 0) {
      if (p.bias) sum[m] += to_float(static_cast<const T*>(p.bias)[row]);
      static_cast<T*>(p.out)[(token + m) * p.w.n + row] = from_float<T>(sum[m]);
    }
  }
}

// Thread t of block b owns 16 bytes of codes.
template <typename T, int Kind>
__global__ void __launch_bounds__(32 * kQuantWarps) dequantize_kernel(QuantWeight w, T* out) {
  using C = Codes<Kind>;
  const int64_t across = w.k / C::count;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= w.n * across) return;
  const int64_t row = i / across, chunk = i % across;
  const Pack<uint32_t> codes = quant_codes(w, row, chunk);
  const QuantScale s(w, row, chunk * C::count);
  T* to = out + row * w.k + chunk * C::count;
#pragma unroll
  for (int at = 0; at < C::count; at += Pack<T>::size) {
    Pack<T> values;
#pragma unroll
    for (int j = 0; j < Pack<T>::size; ++j)
      values.value[j] = from_float<T>(C::number(codes, at + j, s.zero, w.table) * s.scale);
    store_pack(to + at, values);
  }
}

}  // namespace fastllm

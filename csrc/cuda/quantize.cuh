// Numbers to codes: a team of threads reads a group once, finds its scale, and writes its codes.
#pragma once

#include "cuda/host_device.h"
#include "cuda/quant_params.h"
#include "cuda/vector.cuh"

namespace fastllm {

// A thread takes kQuantStep neighbours at a time; the first kQuantHeld times stay in registers.
constexpr int kQuantHeld = 4, kQuantBlock = 256;

template <typename T>
struct Stretch {
  Pack<T> part[kQuantStep / Pack<T>::size];
  __device__ __forceinline__ void load(const T* at) {
#pragma unroll
    for (int i = 0; i < kQuantStep / Pack<T>::size; ++i)
      part[i] = load_pack(at + i * Pack<T>::size);
  }
  __device__ __forceinline__ float operator[](int i) const {
    return to_float(part[i / Pack<T>::size].value[i % Pack<T>::size]);
  }
};

// Bits of the largest magnitude; for int4 of the largest number and of the largest negated one, 0
// at least. As integers, floats of one sign compare as they do; NaN is above all numbers.
template <int Kind>
struct Extent {
  int32_t high = 0, low = 0;

  template <typename T>
  __device__ __forceinline__ void take(const Stretch<T>& x) {
#pragma unroll
    for (int i = 0; i < kQuantStep; ++i) {
      const uint32_t bits = bits_of(x[i]);
      if (Kind == kQuantInt4) {
        high = max(high, static_cast<int32_t>(bits));
        low = max(low, static_cast<int32_t>(bits ^ 0x80000000u));
      } else {
        high = max(high, static_cast<int32_t>(bits & 0x7fffffffu));
      }
    }
  }

  // Of all threads of a team: lanes next to each other, or the whole block.
  __device__ __forceinline__ void reduce() {
    const int team = static_cast<int>(blockDim.x);
    for (int step = min(team, 32) / 2; step > 0; step /= 2) {
      high = max(high, __shfl_xor_sync(0xffffffffu, high, step));
      if (Kind == kQuantInt4) low = max(low, __shfl_xor_sync(0xffffffffu, low, step));
    }
    if (team <= 32) return;
    int32_t* found = reinterpret_cast<int32_t*>(shared_memory);
    const int at = static_cast<int>(threadIdx.x) / 32, warps = team / 32;
    if (threadIdx.x % 32 == 0) found[at] = high, found[warps + at] = low;
    __syncthreads();
    for (int i = 0; i < warps; ++i) {
      high = max(high, found[i]);
      low = max(low, found[warps + i]);
    }
  }
};

struct GroupScale {
  float value, inverse, zero;
  bool good, plain;  // plain: far from where the corrected product below would fail

  // x / value as division rounds it (Markstein 1990).
  __device__ __forceinline__ float ratio(float x) const {
    if (!good) return 0.0f;
    if (!plain) return x / value;
    const float q = x * inverse;
    return fmaf(fmaf(-q, value, x), inverse, q);
  }
};

// Half to even, for |x| < 2^22: the sum has no bits left for a fraction, and its last ones are
// those of the integer.
constexpr float kQuantRound = 12582912.0f;
__device__ __forceinline__ float nearest(float x) { return (x + kQuantRound) - kQuantRound; }

template <int Kind>
__device__ __forceinline__ GroupScale group_scale(const Extent<Kind>& e, bool asymmetric) {
  const float high = float_of(static_cast<uint32_t>(e.high));
  const float low = float_of(static_cast<uint32_t>(e.low));
  const bool finite = max(e.high, e.low) < 0x7f800000;
  float value = high;
  if (Kind == kQuantInt8) value = high / 127.0f;
  if (Kind == kQuantInt4) {
    value = asymmetric ? high / 15.0f + low / 15.0f : high >= low ? high * -0.125f : low * 0.125f;
    value = to_float(from_float<__nv_bfloat16>(value));
  }
  if (!finite) value = float_of(0x7fc00000u);
  GroupScale s = {value, 0.0f, asymmetric ? 0.0f : 8.0f, finite && value != 0.0f, false};
  if (s.good) {
    const uint32_t size = bits_of(value) & 0x7fffffffu;
    s.inverse = 1.0f / value;
    s.plain = size > 27u << 23 && size < 227u << 23;
    if (asymmetric) s.zero = nearest(min(low / value, 15.0f));
  }
  return s;
}

// The code of the number of nf4 or fp4 that is nearest to q.
__device__ __forceinline__ uint32_t nearest_code(const Quantize& p, float q) {
  float left[15];  // the thresholds that may still be next to q, the middle one asked first
#pragma unroll
  for (int i = 0; i < 15; ++i) left[i] = p.thresholds[i];
  int place = 0;
#pragma unroll
  for (int half = 8; half > 0; half /= 2) {
    const bool above = q > left[half - 1];
    place += above ? half : 0;
#pragma unroll
    for (int i = 0; i < half - 1; ++i) left[i] = above ? left[half + i] : left[i];
  }
  return static_cast<uint32_t>(p.order >> (4 * place)) & 15u;
}

template <int Kind>
__device__ __forceinline__ uint32_t code_of(const Quantize& p, float q, float zero) {
  if (Kind == kQuantInt8) return bits_of(min(max(q, -127.0f), 127.0f) + kQuantRound) & 255u;
  if (Kind == kQuantInt4) {
    return bits_of(min(max(nearest(q) + zero, 0.0f), 15.0f) + kQuantRound) & 15u;
  }
  return nearest_code(p, q);
}

template <int Kind, typename T>
__device__ __forceinline__ void store_codes(const Quantize& p, int64_t at, const Stretch<T>& x,
                                            const GroupScale& s) {
  uint32_t codes[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kQuantStep; ++i) {
    const uint32_t code = code_of<Kind>(p, s.ratio(x[i]), s.zero);
    codes[Kind == kQuantInt8 ? i / 4 : 0] |= code << (Kind == kQuantInt8 ? i % 4 * 8 : i * 4);
  }
  if (Kind == kQuantInt8) {
    static_cast<uint2*>(p.codes)[at / 8] = {codes[0], codes[1]};
  } else {
    static_cast<uint32_t*>(p.codes)[at / 8] = codes[0];
  }
}

// Threads x of (block, y) own group number block * blockDim.y + y, `across` of them in a row.
template <typename T, int Kind>
__global__ void __launch_bounds__(kQuantBlock) quantize_kernel(Quantize p, int64_t across) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t row = across == 1 ? group : group / across;
  const int64_t first = (group - row * across) * p.group, start = row * p.k + first;
  const bool inside = row < p.rows;  // all threads take part in the sums of their warp
  const int64_t count = inside ? min(p.group, p.k - first) : 0;
  const T* x = static_cast<const T*>(p.x) + start;
  const int64_t own = static_cast<int64_t>(threadIdx.x) * kQuantStep;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kQuantStep, rest = own + kQuantHeld * step;
  Stretch<T> held[kQuantHeld], more;
  Extent<Kind> e;
#pragma unroll
  for (int i = 0; i < kQuantHeld; ++i) {
    if (own + i * step >= count) continue;
    held[i].load(x + own + i * step);
    e.take(held[i]);
  }
  for (int64_t at = rest; at < count; at += step) {
    more.load(x + at);
    e.take(more);
  }
  e.reduce();
  if (!inside) return;
  const bool asymmetric = Kind == kQuantInt4 && p.zeros;
  const GroupScale s = group_scale<Kind>(e, asymmetric);
  if (threadIdx.x == 0) {
    if (Kind == kQuantInt4) {
      static_cast<__nv_bfloat16*>(p.scales)[group] = from_float<__nv_bfloat16>(s.value);
      if (asymmetric)
        static_cast<__nv_bfloat16*>(p.zeros)[group] = from_float<__nv_bfloat16>(s.zero);
    } else {
      static_cast<float*>(p.scales)[group] = s.value;
    }
  }
#pragma unroll
  for (int i = 0; i < kQuantHeld; ++i) {
    if (own + i * step < count) store_codes<Kind>(p, start + own + i * step, held[i], s);
  }
  for (int64_t at = rest; at < count; at += step) {
    more.load(x + at);
    store_codes<Kind>(p, start + at, more, s);
  }
}

}  // namespace fastllm

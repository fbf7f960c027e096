// The arithmetic of the optimizers, one value at a time: the same code on the GPU and, for tests, on
// the host. Formulas as in csrc/cpu/kernels/optim.inl, codes as in fastllm/optim/states.py.
#pragma once

#include <math.h>

#include "cuda/host_device.h"
#include "cuda/optim_params.h"

namespace fastllm {

// ---- random numbers

HOST_DEVICE uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}

constexpr uint32_t kGolden = 0x9e3779b9u;
constexpr int64_t kDealt = 4 * kScaled;  // elements that share a number of their own

HOST_DEVICE uint32_t key_of(uint32_t seed, uint32_t number, float time) {
  return mixed(mixed(seed + kGolden * number) + static_cast<uint32_t>(time));
}

// The number of element `at`'s group; unsigned codes take mixed() of it.
HOST_DEVICE uint32_t group_bits(uint32_t key, int64_t at) {
  const uint64_t group = static_cast<uint64_t>(at / kDealt);
  return mixed(static_cast<uint32_t>(group) * kGolden +
               mixed(static_cast<uint32_t>(group >> 32)) + key);
}
HOST_DEVICE uint32_t place_bits(int64_t at) {
  return mixed(static_cast<uint32_t>(at % kDealt) * kGolden);
}

// ---- states in 8 bits, as numbers in units of scale / unit

HOST_DEVICE float unit_of(int store) {
  switch (store) {
    case kSignedOctaves: return 1.875f - 0x1p-15f;
    case kOctaves: return 1.875f;
    case kFp8: return 448.0f;
    default: return 448.0f * 448.0f;
  }
}

HOST_DEVICE float from_e4m3(uint32_t c) {
  return c < 8 ? static_cast<float>(c) * 0x1p-9f : float_of((c << 20) + 0x3c000000u);
}
HOST_DEVICE uint32_t floor_e4m3(float x) {
  return x < 0x1p-6f ? static_cast<uint32_t>(x * 0x1p9f) : (bits_of(x) >> 20) - (120u << 3);
}

HOST_DEVICE float decoded(int store, uint32_t byte) {
  const uint32_t sign = byte >> 7 << 31;
  float x;
  switch (store) {
    case kSignedOctaves:
      x = float_of(((byte & 0x7fu) << 20) | 0x38000000u) - 0x1p-15f;
      return float_of(bits_of(x) | sign);
    case kOctaves:
      return float_of(((byte ^ 0x80u) << 20) + 0x30000000u);
    case kFp8:
      return float_of(bits_of(from_e4m3(byte & 0x7fu)) | sign);
    default:
      x = from_e4m3(byte);
      return x * x;
  }
}

// The code below y or the one above, as 23 random bits have it.
HOST_DEVICE uint32_t up_or_down(uint32_t low, float below, float above, float y, uint32_t random) {
  const float share = static_cast<float>(random & 0x7fffffu) * 0x1p-23f;
  return share * (above - below) < y - below ? low + 1 : low;
}

// The code of v, whose size in units is |v| factor; usable: the scale is neither 0 nor inf nor NaN.
HOST_DEVICE uint32_t encoded(int store, float v, float factor, bool usable, uint32_t random) {
  const float y = usable ? fabsf(v) * factor : 0.0f;
  const uint32_t sign = bits_of(v) >> 31 << 7;
  switch (store) {
    case kSignedOctaves:
      return ((bits_of(usable ? fmaf(fabsf(v), factor, 0x1p-15f) : 0x1p-15f) +
               (random & 0xfffffu)) >> 20 & 0x7fu) | sign;
    case kOctaves:
      return (bits_of(y < 0x1p-31f ? 0x1p-31f : y) + (random & 0xfffffu) - 0x38000000u) >> 20 &
             0xffu;
    case kFp8: {
      // below 2^-6 codes are evenly spaced, as floats' first three bits are from 2^-6 on
      const bool even = y < 0x1p-6f;
      const uint32_t bits = bits_of(even ? y + 0x1p-6f : y) + (random & 0xfffffu);
      return ((bits - (even ? 0x3c800000u : 0x3c000000u)) >> 20) | sign;
    }
    default: {
      const uint32_t low = floor_e4m3(sqrtf(y));
      const float below = from_e4m3(low), above = from_e4m3(low + 1);
      const uint32_t code = up_or_down(low, below * below, above * above, y, random);
      return usable && code == 0 ? 1 : code;  // a second moment of zero would make steps endless
    }
  }
}

// The scale of a block from the bits of its largest magnitude.
HOST_DEVICE float scale_of(int store, uint32_t top) {
  const float scale = float_of(top), least = unit_of(store) * 0x1p-126f;
  return top < 0x00800000u ? 0.0f : scale < least ? least : scale;
}
HOST_DEVICE bool is_usable(float scale) { return scale > 0.0f && scale <= 3.402823466e38f; }
// A little short of the unit: rounding never takes the largest past the last code.
HOST_DEVICE float factor_of(int store, float scale) {
  return is_usable(scale) ? unit_of(store) * (1.0f - 0x1p-22f) / scale : 0.0f;
}

// The upper half of a float, up or down at random; NaN stays a quiet NaN.
HOST_DEVICE uint16_t half_bits(float x, uint32_t random) {
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>((x != x ? bits | 0x400000u : bits + (random & 0xffffu)) >> 16);
}

// ---- the updates

// What all gradients are multiplied by: 1 / loss scale, and clipping; NaN goes on.
HOST_DEVICE float gradient_factor(float scale, float norm, float max_norm) {
  const float clip = max_norm / (norm + 1e-6f);
  return clip > 1.0f ? 1.0f / scale : clip / scale;
}

HOST_DEVICE OptimUse make_use(int kind, const OptimSettings& s, double lr, float time, bool fresh,
                              float factor, uint32_t number) {
  OptimUse u = {};
  u.grad = s.sign * factor;
  u.l2 = s.decoupled ? 0.0f : static_cast<float>(s.weight_decay);
  // along: decay does not follow the tensor's own size of the step
  const double decayed = kind == kOptimAlong ? s.lr : lr;
  u.decay = s.decoupled ? static_cast<float>(1 - decayed * s.weight_decay) : 1.0f;
  u.step = static_cast<float>(lr);
  u.mix1 = static_cast<float>(1 - s.one);
  u.keep2 = static_cast<float>(s.two);
  u.mix2 = static_cast<float>(1 - s.two);
  u.eps = static_cast<float>(s.eps);
  u.momentum = static_cast<float>(s.one);
  u.damp = fresh ? 1.0f : static_cast<float>(1 - s.two);
  u.nesterov = s.nesterov;
  u.stochastic = s.stochastic;
  u.key = key_of(s.seed, number, time);
  // the second update of a step: its seed is the first one's key
  if (kind == kOptimAlong) u.key = key_of(u.key, number, 0.0f);
  if (kind == kOptimAdam) {
    const double t = time;
    u.step = static_cast<float>(lr / (1 - pow(s.one, t)));
    u.root = static_cast<float>(1 / sqrt(1 - pow(s.two, t)));
  }
  return u;
}

// p and the states s after a step with gradient g.
template <int KIND>
HOST_DEVICE void update(const OptimUse& u, int states, float g, float& p, float (&s)[3]) {
  g *= u.grad;
  if (u.l2 != 0.0f) g += u.l2 * p;
  if (KIND == kOptimAdam) {
    s[0] += u.mix1 * (g - s[0]);
    s[1] = g * g * u.mix2 + s[1] * u.keep2;
    float v = s[1];
    if (states > 2) v = s[2] = v < s[2] ? s[2] : v;  // NaN goes on
    p = p * u.decay - u.step * (s[0] / (sqrtf(v) * u.root + u.eps));
  } else if (KIND == kOptimSgd) {
    if (states > 0) {
      s[0] = u.damp * g + s[0] * u.momentum;
      g = u.nesterov ? g + u.momentum * s[0] : s[0];
    }
    p = p * u.decay - u.step * g;
  } else {
    const float along = s[0] + u.mix1 * (g - s[0]);
    s[0] += u.mix2 * (g - s[0]);
    // sign(0) is 0, and NaN stays NaN
    p = p * u.decay - u.step * (along > 0.0f ? 1.0f : along < 0.0f ? -1.0f : along);
  }
}

}  // namespace fastllm

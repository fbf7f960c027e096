// The arithmetic of the norms, one value at a time: the same code on the GPU and, for tests, on
// the host. Formulas as in kernels/norm.py.
#pragma once

#include "cuda/host_device.h"

namespace fastllm {

// Mean and squared deviation of `count` values.
struct Moments {
  float mean = 0.0f;
  float m2 = 0.0f;
  float count = 0.0f;
};

// Welford's step.
HOST_DEVICE void add_value(Moments& m, float x) {
  m.count += 1.0f;
  const float delta = x - m.mean;
  m.mean += delta / m.count;
  m.m2 += delta * (x - m.mean);
}

// (x - mean) * rstd * (weight + offset) + bias; scale is weight + offset
HOST_DEVICE float normalize(float x, float mean, float rstd, float scale, float bias) {
  return (x - mean) * rstd * scale + bias;
}

// n is the normalized value, g the gradient times scale, along = mean(g * n)
HOST_DEVICE float input_grad(float g, float n, float mean_g, float along, float rstd) {
  return (g - mean_g - n * along) * rstd;
}

}  // namespace fastllm

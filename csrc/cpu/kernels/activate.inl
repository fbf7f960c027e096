// What linear layers may do to their sums: gemm.h's Activation.
#pragma once
#include "cpu/kernels/math.inl"

// A value, and its slope where that is asked for.
struct Point {
  Vec value, slope;
};

template <bool Slope>
INLINE Point gelu(Vec x) {
  const Normal n = normal(x);
  return {x * n.cumulative, Slope ? fma(x, n.density, n.cumulative) : zero()};
}

// x * sigmoid(u(x)) with the derivative of u: SiLU, and the tanh form of GELU.
template <bool Slope>
INLINE Point gate(Vec x, Vec u, Vec du) {
  if (!Slope) return {x * sigmoid(u), zero()};
  const Sigmoid s = sigmoids(u);
  return {x * s.value, s.value * fma(x * du, s.complement, set1(1.0f))};
}

template <bool Slope>
INLINE Point gelu_tanh(Vec x) {
  constexpr float kScale = 1.59576912f, kCube = 0.044715f;  // 2 sqrt(2 / pi)
  const Vec square = x * x;
  return gate<Slope>(x, x * set1(kScale) * fma(square, set1(kCube), set1(1.0f)),
                     set1(kScale) * fma(square, set1(3 * kCube), set1(1.0f)));
}

// NaN stays NaN.
template <bool Slope, bool Square>
INLINE Point relu(Vec x) {
  const Vec r = at_least(x, 0.0f);
  if (Square) return {r * r, r + r};
  return {r, Slope ? choose(less(zero(), x), set1(1.0f), zero()) : zero()};
}

template <bool Slope>
INLINE Point activate(int activation, Vec x) {
  switch (activation) {
    case gemm::kGelu: return gelu<Slope>(x);
    case gemm::kGeluTanh: return gelu_tanh<Slope>(x);
    case gemm::kSilu: return gate<Slope>(x, x, set1(1.0f));
    case gemm::kRelu: return relu<Slope, false>(x);
    case gemm::kRelu2: return relu<Slope, true>(x);
    default: return {x, set1(1.0f)};
  }
}

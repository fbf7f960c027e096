// What softmax and the losses share: maxima, exponentials of what is not positive, log-sum-exp.
#pragma once
#include "cpu/kernels/math.inl"

constexpr float kInf = __builtin_inff();

// b where a < b: NaN in b is dropped, NaN in a is kept.
INLINE Vec larger(Vec a, Vec b) { return {a.v < b.v ? b.v : a.v}; }
INLINE float largest(Vec a) {
  float lanes[W], top = -kInf;
  store(lanes, a);
  for (int i = 0; i < W; ++i) top = top < lanes[i] ? lanes[i] : top;
  return top;
}

// The touched lanes of a, `other` in the rest.
INLINE Vec or_else(Vec a, All, float) { return a; }
INLINE Vec or_else(Vec a, First lanes, float other) {
  return choose(less(zero(), keep(set1(1.0f), lanes.n)), a, set1(other));
}

// e^x for x <= 0, to 1-2 ulp or, where Short, to 1e-5; 0 below -87.3, where e^x is no longer a
// normal number.
template <bool Short = false>
INLINE Vec exp_down(Vec x) {
  constexpr float kShift = 12582912.0f, kLeast = -87.3f;
  constexpr float kTerms[] = {0.49999994f, 0.166665196f, 0.0416683927f, 0.00836878084f,
                              0.00138144626f};
  const Vec bounded = {x.v < set1(kLeast).v ? set1(kLeast).v : x.v};
  const Vec shifted = fma(bounded, set1(1.44269504f), set1(kShift)), k = shifted - set1(kShift);
  const Ints n = (Ints)shifted.v - (Ints)set1(kShift).v;
  Vec p;
  if (Short) {
    const Vec r = fma(k, set1(-0.693147181f), bounded);
    p = fma(r * r, polynomial(r, kShortExp), r) + set1(1.0f);
  } else {
    const Vec r = fma(k, set1(2.12194440e-4f), fma(k, set1(-0.693359375f), bounded));
    p = fma(r * r, polynomial(r, kTerms), r) + set1(1.0f);
  }
  const Vec e = p * Vec{(Floats)((n + 127) << 23)};
  return {x.v < set1(kLeast).v ? zero().v : e.v};
}

// ln x for positive normal x, to 1-2 ulp near 1 and elsewhere: x = 2^k m with m in [0.7, 1.41].
INLINE Vec log_normal(Vec x) {
  constexpr float kTerms[] = {-0.499999885f, 0.333333382f,  -0.250015752f,
                              0.200011742f,  -0.166085963f, 0.141966865f,
                              -0.132619947f, 0.128195122f,  -0.0747321078f};
  const Ints bits = (Ints)x.v, k = (bits - 0x3f3504f3) >> 23;
  const Vec m = {(Floats)(bits - (k << 23))}, f = m - set1(1.0f);
  const Vec whole = {__builtin_convertvector(k, Floats)};
  const Vec tail = fma(f * f, polynomial(f, kTerms), whole * set1(-2.12194440e-4f));
  return fma(whole, set1(0.693359375f), f + tail);
}

INLINE float exp_one(float x) { return x < -103.0f ? 0.0f : __builtin_expf(x); }

// Logits as they are.
struct Same {
  INLINE_MEMBER Vec operator()(Vec x) const { return x; }
  INLINE_MEMBER Vec slope(Vec) const { return set1(1.0f); }
  INLINE_MEMBER double at(double x) const { return x; }
  INLINE_MEMBER double slope_at(double) const { return 1.0; }
};

// Logits times a factor.
struct Scaled {
  float factor;
  INLINE_MEMBER Vec operator()(Vec x) const { return x * set1(factor); }
  INLINE_MEMBER Vec slope(Vec) const { return set1(factor); }
  INLINE_MEMBER double at(double x) const { return double(float(x) * factor); }
  INLINE_MEMBER double slope_at(double) const { return factor; }
};

// Logits times a factor, bounded: cap * tanh(x * factor / cap).
struct Capped {
  float factor, cap;
  INLINE_MEMBER Vec operator()(Vec x) const {
    return set1(cap) * tanh(x * set1(factor / cap));
  }
  // factor * (1 - tanh^2), as 4 e / (1 + e)^2 so that it stays exact where tanh is 1
  INLINE_MEMBER Vec slope(Vec x) const {
    const Vec e = exp_down(abs(x * set1(factor / cap)) * set1(-2.0f)), sum = e + set1(1.0f);
    return div(set1(4.0f * factor) * e, sum * sum);
  }
  INLINE_MEMBER double at(double x) const { return double(cap) * __builtin_tanh(x * factor / cap); }
  INLINE_MEMBER double slope_at(double x) const {
    const double t = __builtin_tanh(x * factor / cap);
    return factor * (1 - t * t);
  }
};

// Running log-sum-exp of a row: the largest value, and the sum of e^(value - largest).
struct Online {
  float top = -kInf;
  double sum = 0;
  // what is subtracted: a row of -inf so far must not make NaN of -inf - -inf
  INLINE_MEMBER float base() const { return top == -kInf ? 0.0f : top; }
  INLINE_MEMBER void raise(float to) {
    if (to > top) {
      sum *= exp_one(base() - to);
      top = to;
    }
  }
  INLINE_MEMBER double result() const { return double(base()) + __builtin_log(sum); }
};

// Elements that are read twice while they are in the first-level cache.
constexpr i64 kSpan = 2048;

template <class T, class F>
INLINE void online_block(const T* x, i64 n, const F& logit, Online& state) {
  Vec top[4] = {set1(-kInf), set1(-kInf), set1(-kInf), set1(-kInf)};
  sweep(n, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
    top[k] = larger(top[k], or_else(logit(get(x + i, lanes)), lanes, -kInf));
  });
  state.raise(largest(larger(larger(top[0], top[1]), larger(top[2], top[3]))));
  const Vec base = set1(state.base());
  Vec acc[4] = {zero(), zero(), zero(), zero()};
  sweep(n, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
    acc[k] = acc[k] + only(exp_down(logit(get(x + i, lanes)) - base), lanes);
  });
  state.sum += total(acc);
}

// log(sum(e^logit)) of a row, read from memory once.
template <class T, class F>
INLINE Online log_sum_exp(const T* x, i64 n, const F& logit) {
  Online state;
  for (i64 at = 0; at < n; at += kSpan) online_block(x + at, least(kSpan, n - at), logit, state);
  return state;
}

// A double as the sum of two floats: (x - high) - low is exact to fp32 however large the sum is.
struct Split {
  Vec high, low;
  INLINE_MEMBER explicit Split(double value)
      : high(set1(float(value))), low(set1(float(value - double(float(value))))) {}
  INLINE_MEMBER Vec from(Vec x) const { return (x - high) - low; }
};

// Rows of at least this many bytes in all are written past the caches.
constexpr i64 kPastCaches = 8 << 20;
INLINE bool streams(const void* p, i64 row_bytes, i64 rows) {
  return p && rows * row_bytes >= kPastCaches && ((uintptr_t)p | uintptr_t(row_bytes)) % 64 == 0;
}
INLINE i64 share(i64 rows, i64 bytes, int threads) {
  return most(1, ceil_div(rows, bytes < kPastCaches ? threads : 8 * i64(threads)));
}
template <class T>
INLINE double element(const T* p) {
  float lanes[W];
  store(lanes, load(p, 1));
  return lanes[0];
}
template <class T>
INLINE void set_element(T* p, double value) {
  store(p, set1(float(value)), 1);
}

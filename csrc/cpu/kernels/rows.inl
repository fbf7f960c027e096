// What softmax and the losses share: maxima, exponentials of what is not positive, log-sum-exp.
#pragma once
#include "cpu/kernels/math.inl"

constexpr float kInf = __builtin_inff();

// b where a < b: NaN in b is dropped, NaN in a is kept.
INLINE Vec larger(Vec a, Vec b) { return {a.v < b.v ? b.v : a.v}; }

#if FASTLLM_SCALES
constexpr float kLeastExp = -104.5f;
#else
constexpr float kLeastExp = -87.3f;
#endif
// p 2^k in exp_down: k is a whole number, also in the low bits of shifted; 0 for x < kLeastExp.
INLINE Vec scale_down(Vec p, Vec shifted, Vec k, Vec x) {
#if FASTLLM_SCALES
  (void)shifted, (void)x;
  return scale_by_power(p, k);
#else
  (void)k;
  const Vec power = {(Floats)(((Ints)shifted.v << 23) + (127 << 23))}, e = p * power;
  return {x.v < set1(kLeastExp).v ? zero().v : e.v};
#endif
}

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

// e^x for x <= 88, to 1-2 ulp or, where Short, to 1e-5; 0 where e^x is no longer a normal number
// (or, where one instruction scales by powers of 2, no longer a number at all).
template <bool Short = false>
INLINE Vec exp_down(Vec x) {
  constexpr float kShift = 12582912.0f;
  constexpr float kTerms[] = {1.0f,          1.0f,           0.49999994f,   0.166665196f,
                              0.0416683927f, 0.00836878084f, 0.00138144626f};
  constexpr float kShortTerms[] = {1.0f, 1.0f, kShortExp[0], kShortExp[1], kShortExp[2]};
  const Vec bounded = at_least(x, kLeastExp);
  const Vec shifted = fma(bounded, set1(1.44269504f), set1(kShift)), k = shifted - set1(kShift);
  Vec p;
  if (Short) {
    p = polynomial(fma(k, set1(-0.693147181f), bounded), kShortTerms);
  } else {
    const Vec r = fma(k, set1(2.12194440e-4f), fma(k, set1(-0.693359375f), bounded));
    p = polynomial(r, kTerms);
  }
  return scale_down(p, shifted, k, x);
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

// Running log-sum-exp of a row: the sum of e^(value - top), where top is the largest value or not
// far below it.
struct Online {
  float top = -kInf;
  double sum = 0;
  // what is subtracted: a row of -inf so far must not make NaN of -inf - -inf
  INLINE_MEMBER float base() const { return top == -kInf ? 0.0f : top; }
  INLINE_MEMBER void raise(float to) {
    if (to > top) {
      if (top != -kInf) sum *= exp_one(top - to);  // else it is 0, and to may be far below
      top = to;
    }
  }
  INLINE_MEMBER double result() const { return double(base()) + __builtin_log(sum); }
};

// Elements that are read twice while they are in the first-level cache.
constexpr i64 kSpan = 2048;
// What a span's values may be above top: their exponentials and sums stay far from infinity.
constexpr float kAbove = 16.0f;

// Adds a span, with its e^(value - top) in `kept` if Keep; false if a value is too far above top.
template <bool Short, bool Keep, class T, class F>
APART bool add_span(const T* x, i64 n, const F& logit, Online& state, float* kept) {
  const Vec base = set1(state.base());
  Vec top[4] = {base, base, base, base}, acc[4] = {zero(), zero(), zero(), zero()};
  sweep(n, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
    const Vec value = logit(get(x + i, lanes));
    top[k] = larger(top[k], or_else(value, lanes, -kInf));
    const Vec e = only(exp_down<Short>(value - base), lanes);
    if (Keep) put<false>(kept + i, e, lanes);
    acc[k] = acc[k] + e;
  });
  const float reached = largest(larger(larger(top[0], top[1]), larger(top[2], top[3])));
  if (reached > state.base() + kAbove) return false;
  state.sum += total(acc);
  return true;
}

template <class T, class F>
APART float span_top(const T* x, i64 n, const F& logit) {
  Vec top[4] = {set1(-kInf), set1(-kInf), set1(-kInf), set1(-kInf)};
  sweep(n, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
    top[k] = larger(top[k], or_else(logit(get(x + i, lanes)), lanes, -kInf));
  });
  return largest(larger(larger(top[0], top[1]), larger(top[2], top[3])));
}

// A span read once: its largest value is looked for first only where the last top does not serve.
template <bool Short, bool Keep, class T, class F>
INLINE void online_span(const T* x, i64 n, const F& logit, Online& state, float* kept) {
  if (state.top != -kInf && add_span<Short, Keep>(x, n, logit, state, kept)) return;
  state.raise(span_top(x, n, logit));
  add_span<Short, Keep>(x, n, logit, state, kept);
}

// log(sum(e^logit)) of a row, read from memory once.
template <bool Short = false, class T, class F>
INLINE Online log_sum_exp(const T* x, i64 n, const F& logit) {
  Online state;
  for (i64 at = 0; at < n; at += kSpan)
    online_span<Short, false>(x + at, least(kSpan, n - at), logit, state, nullptr);
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

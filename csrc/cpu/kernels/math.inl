// exp, sigmoid, tanh, erf and the normal distribution on vectors, in fp32 to 1-2 ulp at every
// level; where Short, to 1e-5, a fortieth of what rounding to 16 bits may add. Written on the
// compiler's vector operators, which every level's Vec has underneath.
#pragma once

typedef int32_t Ints __attribute__((vector_size(4 * W)));
using Floats = decltype(Vec::v);

INLINE Vec choose(Ints mask, Vec yes, Vec no) {
  return {(Floats)((mask & (Ints)yes.v) | (~mask & (Ints)no.v))};
}
INLINE Ints less(Vec a, Vec b) { return (Ints)(a.v < b.v); }
INLINE Vec div(Vec a, Vec b) { return {a.v / b.v}; }
INLINE Vec neg(Vec a) { return {-a.v}; }
INLINE Vec abs(Vec a) { return {(Floats)((Ints)a.v & 0x7fffffff)}; }
// The magnitude of a with the sign of s.
INLINE Vec with_sign(Vec a, Vec s) {
  return {(Floats)((Ints)a.v | ((Ints)s.v & int32_t(0x80000000)))};
}
INLINE Vec at_least(Vec x, float low) { return at_least(x, set1(low)); }
INLINE Vec at_most(Vec x, float high) { return at_most(x, set1(high)); }

// Evaluates c[0] + c[1] x + ... by Horner's rule.
template <int N>
INLINE Vec polynomial(Vec x, const float (&c)[N]) {
  Vec sum = set1(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) sum = fma(sum, x, set1(c[i]));
  return sum;
}

// (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2, to 1e-5 of e^r
constexpr float kShortExp[] = {0.5000512f, 0.16753535f, 0.0412776619f};

// e^x for x <= 89.
template <bool Short = false>
INLINE Vec exp_bounded(Vec x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kTerms[] = {0.49999994f, 0.166665196f, 0.0416683927f, 0.00836878084f,
                              0.00138144626f};
  x = at_least(x, set1(-104.5f));
  const Vec k = fma(x, set1(1.44269504f), set1(kShift)) - set1(kShift);
  if (Short) {
    const Vec r = fma(k, set1(-0.693147181f), x);
    return scale_by_power(fma(r * r, polynomial(r, kShortExp), r) + set1(1.0f), k);
  }
  const Vec r = fma(k, set1(2.12194440e-4f), fma(k, set1(-0.693359375f), x));
  return scale_by_power(fma(r * r, polynomial(r, kTerms), r) + set1(1.0f), k);
}

// e^x: 0 at -inf, inf from 88.73 on, subnormal below -87.3, NaN at NaN. x = k ln 2 + r with
// |r| <= ln 2 / 2.
INLINE Vec exp(Vec x) { return exp_bounded(at_most(x, set1(89.0f))); }

// 1 / (1 + e^-x) and its complement 1 / (1 + e^x), neither by subtraction.
struct Sigmoid {
  Vec value, complement;
};
template <bool Short = false>
INLINE Sigmoid sigmoids(Vec x) {
  const Vec e = exp_bounded<Short>(neg(abs(x)));
  const Vec large = inverse(set1(1.0f) + e), small = e * large;
  return {where_negative(x, small, large), where_negative(x, large, small)};
}
template <bool Short = false>
INLINE Vec sigmoid(Vec x) {
  return sigmoids<Short>(x).value;
}

INLINE Vec tanh(Vec x) {
  constexpr float kTerms[] = {-0.333332837f, 0.133314908f, -0.0537434928f, 0.0206505693f,
                              -0.0057170256f};
  const Vec t = abs(x), square = x * x;
  const Vec near = fma(x * square, polynomial(square, kTerms), x);
  const Vec e = exp(t + t), far = set1(1.0f) - div(set1(2.0f), e + set1(1.0f));
  return choose(less(t, set1(0.625f)), near, with_sign(far, x));
}

// e^(t^2) erfc(t) for t >= 0, exactly 1 at 0; of use up to t = 10.3. A polynomial in the share v
// that 0.4 t has of 1 + 0.4 t.
template <bool Short = false>
INLINE Vec scaled_erfc(Vec t) {
  constexpr float kTerms[] = {-1.82094896f, 1.60814571f,   -0.467353165f, -0.264758408f,
                              0.115197368f, 0.114123538f,  -0.0202261284f, -0.0678976551f,
                              0.0294231623f};
  constexpr float kShort[] = {-1.82074237f,  1.60353184f,  -0.431915283f,
                              -0.392359287f, 0.347717702f, -0.0803005323f};
  const Vec scaled = t * set1(0.4f), w = inverse(scaled + set1(1.0f)), v = scaled * w;
  if (Short) return w * fma(v, polynomial(v, kShort), set1(1.0f));
  return w * fma(v, polynomial(v, kTerms), set1(1.0f));
}

// e^(-x^2 scale), with the rounding error of x^2 made good.
template <bool Short = false>
INLINE Vec gaussian(Vec x, float scale) {
  if (Short) return exp_bounded<true>(x * x * set1(-scale));
  const Vec bounded = at_most(abs(x), set1(1e15f));  // no inf - inf; there the result is 0
  const Vec square = bounded * bounded, error = fma_once(bounded, bounded, neg(square));
  const Vec e = exp_bounded(square * set1(-scale));
  return fma(e, error * set1(-scale), e);
}

INLINE Vec erf(Vec x) {
  constexpr float kTerms[] = {0.128379166f,   -0.37612626f,    0.112835854f,   -0.026853811f,
                              0.00518832728f, -0.000801019138f, 7.85385346e-05f};
  const Vec t = abs(x);
  const Vec near = fma(x, polynomial(x * x, kTerms), x);
  const Vec tail = gaussian(x, 1.0f) * scaled_erfc(at_most(t, set1(10.3f)));
  return choose(less(t, set1(1.0f)), near, with_sign(set1(1.0f) - tail, x));
}

// The standard normal distribution: P(X <= x), exact in the tail, and its density.
struct Normal {
  Vec cumulative, density;
};
template <bool Short = false>
INLINE Normal normal(Vec x) {
  const Vec e = gaussian<Short>(x, 0.5f);
  const Vec t = at_most(abs(x) * set1(0.707106781f), set1(10.3f));
  const Vec tail = e * set1(0.5f) * scaled_erfc<Short>(t);
  return {where_negative(x, tail, set1(1.0f) - tail), e * set1(0.398942280f)};
}

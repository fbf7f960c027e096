// The vector vocabulary for any CPU: four floats in the compiler's own vector type, no intrinsics.
#define FASTLLM_WORDS "cpu/simd/words_scalar.h"  // for kernels on integers
#define FASTLLM_KEPT "cpu/simd/kept_any.h"       // for weights of which half is kept
constexpr int W = 4;

typedef float f32x4 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));

struct Vec {
  f32x4 v;
};

INLINE Vec set1(float x) { return {f32x4{x, x, x, x}}; }
INLINE Vec zero() { return set1(0.0f); }
INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
// Rounded twice: a software fused multiply-add would cost more than the kernel.
INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// Rounded once, as on the other levels: for where two terms nearly cancel.
INLINE Vec fma_once(Vec a, Vec b, Vec c) {
  typedef double f64x4 __attribute__((vector_size(32)));
  const f64x4 wide = __builtin_convertvector(a.v, f64x4) * __builtin_convertvector(b.v, f64x4) +
                     __builtin_convertvector(c.v, f64x4);
  return {__builtin_convertvector(wide, f32x4)};
}
INLINE Vec root(Vec a) {
  for (int i = 0; i < W; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
INLINE Vec quick_root(Vec a) { return root(a); }
INLINE Vec rough_root(Vec a) { return root(a); }
INLINE Vec rough_fourth_root(Vec a) { return root(root(a)); }
INLINE Vec rough_inverse(Vec a) { return {1.0f / a.v}; }
INLINE Vec quick_quotient(Vec a, Vec b) { return {a.v / b.v}; }
INLINE bool plain(Vec) { return true; }
// The largest lane, taken as unsigned integers: of magnitudes, NaN above inf above all others.
INLINE uint32_t top_bits(Vec a) {
  const u32x4 bits = (u32x4)a.v;
  uint32_t top = 0;
  for (int i = 0; i < W; ++i) top = bits[i] > top ? bits[i] : top;
  return top;
}
INLINE float hsum(Vec a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }

INLINE void hsum4(const Vec (&a)[4], float (&out)[4]) {
  for (int i = 0; i < 4; ++i) out[i] = hsum(a[i]);
}

// bf16 is the upper half of a float: rounding half to even adds 0x7fff plus the last kept bit; NaN
// stays a quiet NaN.
INLINE u32x4 round_bf16(f32x4 v) {
  const u32x4 bits = (u32x4)v, up = bits + (((bits >> 16) & 1) + 0x7fff);
  const u32x4 number = (u32x4)(v == v);
  return (up & number) | ((bits | 0x400000) & ~number);
}
INLINE u32x4 to_half(const bf16*, f32x4 v) { return round_bf16(v) >> 16; }
INLINE f32x4 from_half(const bf16*, u32x4 h) { return (f32x4)(h << 16); }

INLINE u32x4 pick(i32x4 mask, u32x4 yes, u32x4 no) {
  return ((u32x4)mask & yes) | (~(u32x4)mask & no);
}

INLINE f32x4 from_half(const f16*, u32x4 h) {
  const u32x4 sign = (h & 0x8000) << 16, rest = h & 0x7fff;
  // Zero and subnormals are a small integer times 2^-24, exactly.
  const u32x4 small = (u32x4)(__builtin_convertvector((i32x4)rest, f32x4) * 0x1p-24f);
  const u32x4 normal = (rest << 13) + 0x38000000, special = (rest << 13) + 0x70000000;
  return (f32x4)(sign | pick(rest < 0x400, small, pick(rest < 0x7c00, normal, special)));
}
INLINE u32x4 to_half(const f16*, f32x4 v) {
  const u32x4 bits = (u32x4)v, sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  const u32x4 nan = ((rest >> 13) & 0x3ff) | 0x7e00, inf = {0x7c00, 0x7c00, 0x7c00, 0x7c00};
  const u32x4 normal = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
  // Below 2^-14 the float unit rounds for us: at 0.5 a float's last bit is 2^-24, that of a
  // subnormal half.
  const u32x4 small = (u32x4)((f32x4)rest + 0.5f) - 0x3f000000;
  const u32x4 finite = pick(rest < 0x38800000, small, normal);
  // From 65520 on, values round to infinity.
  return sign | pick(rest > 0x7f800000, nan, pick(rest >= 0x477ff000, inf, finite));
}

INLINE Vec load(const float* p) {
  Vec a;
  __builtin_memcpy(&a, p, 16);
  return a;
}
INLINE Vec load(const float* p, int n) {
  Vec a = zero();
  for (int i = 0; i < n; ++i) a.v[i] = p[i];
  return a;
}
INLINE void store(float* p, Vec a) { __builtin_memcpy(p, &a, 16); }
INLINE void store(float* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}

template <class T>
INLINE Vec load(const T* p) {
  return {from_half(p, u32x4{p[0].bits, p[1].bits, p[2].bits, p[3].bits})};
}
template <class T>
INLINE Vec load(const T* p, int n) {
  u32x4 h = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) h[i] = p[i].bits;
  return {from_half(p, h)};
}
template <class T>
INLINE void store(T* p, Vec a, int n) {
  const u32x4 h = to_half(p, a.v);
  for (int i = 0; i < n; ++i) p[i].bits = uint16_t(h[i]);
}
template <class T>
INLINE void store(T* p, Vec a) {
  store(p, a, W);
}

template <class T>
INLINE void stream(T* p, Vec a) {
  store(p, a);
}
INLINE void stream_fence() {}

// The first n lanes of a, zero in the others.
INLINE Vec keep(Vec a, int n) {
  for (int i = n; i < W; ++i) a.v[i] = 0.0f;
  return a;
}

// The value after a round trip through T.
INLINE Vec rounded(const float*, Vec a) { return a; }
template <class T>
INLINE Vec rounded(const T* p, Vec a) {
  return {from_half(p, to_half(p, a.v))};
}

// W bytes as the 32-bit integers in the lanes.
INLINE u32x4 load_bytes(const uint8_t* p) { return u32x4{p[0], p[1], p[2], p[3]}; }

INLINE u32x4 load_signed_bytes(const uint8_t* p) {
  const int8_t* s = (const int8_t*)p;
  return (u32x4)i32x4{s[0], s[1], s[2], s[3]};
}

// What math.inl is made of. Bounds let NaN in x through.
INLINE Vec at_least(Vec x, Vec low) {
  return {(f32x4)pick((i32x4)(x.v < low.v), (u32x4)low.v, (u32x4)x.v)};
}
INLINE Vec at_most(Vec x, Vec high) {
  return {(f32x4)pick((i32x4)(x.v > high.v), (u32x4)high.v, (u32x4)x.v)};
}
INLINE Vec where_negative(Vec sign, Vec yes, Vec no) {
  return {(f32x4)pick((i32x4)sign.v >> 31, (u32x4)yes.v, (u32x4)no.v)};
}
// p 2^k for integers k in [-152, 128], rounded once, and p in [0.5, 2]: in two factors, each of
// them a normal number.
INLINE Vec scale_by_power(Vec p, Vec k) {
  const i32x4 n = __builtin_convertvector(k.v, i32x4), half = n >> 1;
  const Vec first = {(f32x4)((half + 127) << 23)}, second = {(f32x4)((n - half + 127) << 23)};
  return p * first * second;
}
// 1 / d for d in [1, 2^40].
INLINE Vec inverse(Vec d) { return {1.0f / d.v}; }

// Lanes 2i and 2i + 1 exchanged.
INLINE Vec swap_pairs(Vec a) { return {f32x4{a.v[1], a.v[0], a.v[3], a.v[2]}}; }

// The low byte of each lane.
INLINE void store_bytes(uint8_t* p, u32x4 a) {
  for (int i = 0; i < W; ++i) p[i] = uint8_t(a[i]);
}

// Entry i of 16, for the i in each lane.
INLINE Vec lookup(const float* table, u32x4 index) {
  return {f32x4{table[index[0]], table[index[1]], table[index[2]], table[index[3]]}};
}
INLINE Vec exact_quotient(Vec a, Vec b, Vec) { return {a.v / b.v}; }

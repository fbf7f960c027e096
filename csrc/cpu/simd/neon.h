// The vector vocabulary on AArch64 NEON: 4 floats. fp16 conversion is part of the base
// architecture.
#define FASTLLM_WORDS "cpu/simd/words_neon.h"  // for kernels on integers
#define FASTLLM_KEPT "cpu/simd/kept_any.h"       // for weights of which half is kept
constexpr int W = 4;

struct Vec {
  float32x4_t v;
};

INLINE Vec zero() { return {vdupq_n_f32(0.0f)}; }
INLINE Vec set1(float x) { return {vdupq_n_f32(x)}; }
INLINE Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
INLINE Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
INLINE Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
INLINE Vec fma_once(Vec a, Vec b, Vec c) { return fma(a, b, c); }
INLINE Vec root(Vec a) { return {vsqrtq_f32(a.v)}; }
INLINE Vec quick_root(Vec a) { return root(a); }
INLINE Vec rough_root(Vec a) { return root(a); }
INLINE Vec rough_fourth_root(Vec a) { return root(root(a)); }
INLINE Vec rough_inverse(Vec a) { return {vdivq_f32(vdupq_n_f32(1.0f), a.v)}; }
INLINE Vec quick_quotient(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
INLINE bool plain(Vec) { return true; }
// The largest lane, taken as unsigned integers: of magnitudes, NaN above inf above all others.
INLINE uint32_t top_bits(Vec a) { return vmaxvq_u32(vreinterpretq_u32_f32(a.v)); }
INLINE float hsum(Vec a) { return vaddvq_f32(a.v); }

INLINE void hsum4(const Vec (&a)[4], float (&out)[4]) {
  for (int i = 0; i < 4; ++i) out[i] = hsum(a[i]);
}

// bf16 is the upper half of a float: rounding half to even adds 0x7fff plus the last kept bit; NaN
// stays a quiet NaN.
INLINE uint32x4_t round_bf16(float32x4_t v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vbslq_u32(vceqq_f32(v, v), up, vorrq_u32(bits, vdupq_n_u32(0x400000)));
}
INLINE uint16x4_t to_bf16(Vec a) { return vshrn_n_u32(round_bf16(a.v), 16); }
INLINE uint16x4_t to_f16(Vec a) { return vreinterpret_u16_f16(vcvt_f16_f32(a.v)); }
INLINE Vec from_bf16(uint16x4_t h) {
  return {vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(h), 16))};
}
INLINE Vec from_f16(uint16x4_t h) { return {vcvt_f32_f16(vreinterpret_f16_u16(h))}; }

INLINE uint16x4_t load_halves(const void* p, int n) {
  uint16_t lanes[4] = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) lanes[i] = ((const uint16_t*)p)[i];
  return vld1_u16(lanes);
}
INLINE void store_halves(void* p, uint16x4_t h, int n) {
  uint16_t lanes[4];
  vst1_u16(lanes, h);
  for (int i = 0; i < n; ++i) ((uint16_t*)p)[i] = lanes[i];
}

INLINE Vec load(const float* p) { return {vld1q_f32(p)}; }
INLINE Vec load(const bf16* p) { return from_bf16(vld1_u16((const uint16_t*)p)); }
INLINE Vec load(const f16* p) { return from_f16(vld1_u16((const uint16_t*)p)); }
INLINE Vec load(const float* p, int n) {
  float lanes[4] = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return {vld1q_f32(lanes)};
}
INLINE Vec load(const bf16* p, int n) { return from_bf16(load_halves(p, n)); }
INLINE Vec load(const f16* p, int n) { return from_f16(load_halves(p, n)); }

INLINE void store(float* p, Vec a) { vst1q_f32(p, a.v); }
INLINE void store(bf16* p, Vec a) { vst1_u16((uint16_t*)p, to_bf16(a)); }
INLINE void store(f16* p, Vec a) { vst1_u16((uint16_t*)p, to_f16(a)); }
INLINE void store(float* p, Vec a, int n) {
  float lanes[4];
  vst1q_f32(lanes, a.v);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
INLINE void store(bf16* p, Vec a, int n) { store_halves(p, to_bf16(a), n); }
INLINE void store(f16* p, Vec a, int n) { store_halves(p, to_f16(a), n); }

// No store here bypasses the caches in a way worth having.
template <class T>
INLINE void stream(T* p, Vec a) {
  store(p, a);
}
INLINE void stream_fence() {}

// The first n lanes of a, zero in the others.
INLINE Vec keep(Vec a, int n) {
  const int32_t at[4] = {0, 1, 2, 3};
  const uint32x4_t mask = vcltq_s32(vld1q_s32(at), vdupq_n_s32(n));
  return {vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a.v), mask))};
}

// The value after a round trip through T.
INLINE Vec rounded(const float*, Vec a) { return a; }
INLINE Vec rounded(const bf16*, Vec a) {
  return {vreinterpretq_f32_u32(vandq_u32(round_bf16(a.v), vdupq_n_u32(0xffff0000u)))};
}
INLINE Vec rounded(const f16*, Vec a) { return from_f16(to_f16(a)); }

// W bytes as the 32-bit integers in the lanes.
INLINE uint32x4_t load_bytes(const uint8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
}

INLINE uint32x4_t load_signed_bytes(const uint8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(vcreate_u8(four)));
  return vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(wide)));
}

// What math.inl is made of. Bounds let NaN in x through.
INLINE Vec at_least(Vec x, Vec low) { return {vmaxq_f32(x.v, low.v)}; }
INLINE Vec at_most(Vec x, Vec high) { return {vminq_f32(x.v, high.v)}; }
INLINE Vec where_negative(Vec sign, Vec yes, Vec no) {
  return {vbslq_f32(vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_f32(sign.v), 31)), yes.v,
                    no.v)};
}
// p 2^k for integers k in [-152, 128], rounded once, and p in [0.5, 2]: in two factors, each of
// them a normal number.
INLINE Vec scale_by_power(Vec p, Vec k) {
  const int32x4_t n = vcvtnq_s32_f32(k.v), half = vshrq_n_s32(n, 1), one = vdupq_n_s32(127);
  const int32x4_t rest = vsubq_s32(n, half);
  const Vec first = {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, one), 23))};
  const Vec second = {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, one), 23))};
  return p * first * second;
}
// 1 / d for d in [1, 2^40].
INLINE Vec inverse(Vec d) { return {vdivq_f32(vdupq_n_f32(1.0f), d.v)}; }

// Lanes 2i and 2i + 1 exchanged.
INLINE Vec swap_pairs(Vec a) { return {vrev64q_f32(a.v)}; }

// The low byte of each lane.
INLINE void store_bytes(uint8_t* p, uint32x4_t a) {
  const uint8x8_t low = vmovn_u16(vcombine_u16(vmovn_u32(a), vdup_n_u16(0)));
  __builtin_memcpy(p, &low, 4);
}

// Entry i of 16, for the i in each lane.
INLINE Vec lookup(const float* table, uint32x4_t index) {
  const float lanes[4] = {table[vgetq_lane_u32(index, 0)], table[vgetq_lane_u32(index, 1)],
                          table[vgetq_lane_u32(index, 2)], table[vgetq_lane_u32(index, 3)]};
  return {vld1q_f32(lanes)};
}
INLINE Vec exact_quotient(Vec a, Vec b, Vec) { return {vdivq_f32(a.v, b.v)}; }

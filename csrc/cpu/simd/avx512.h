// The vector vocabulary on AVX-512 (F, BW, DQ, VL): 16 floats. Included inside a target region.
#define FASTLLM_WORDS "cpu/simd/words_avx512.h"  // for kernels on integers
#define FASTLLM_KEPT "cpu/simd/kept_avx512.h"    // for weights of which half is kept
constexpr int W = 16;

struct Vec {
  __m512 v;
};

INLINE Vec zero() { return {_mm512_setzero_ps()}; }
INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE Vec fma_once(Vec a, Vec b, Vec c) { return fma(a, b, c); }
INLINE Vec root(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
// A square root to within two units in the last place, for a >= 0: a quarter of the time.
INLINE Vec quick_root(Vec a) {
  const __m512 x = _mm512_add_ps(a.v, _mm512_set1_ps(0x1p-100f)), y = _mm512_rsqrt14_ps(x);
  const __m512 s = _mm512_mul_ps(x, y), half = _mm512_mul_ps(y, _mm512_set1_ps(0.5f));
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(s, s, x), half, s)};
}
// Within 2^-13 of the root, the fourth root and the inverse, for what is rounded to 8 bits anyway.
INLINE Vec rough_root(Vec a) {
  const __m512 x = _mm512_add_ps(a.v, _mm512_set1_ps(0x1p-126f));
  return {_mm512_mul_ps(x, _mm512_rsqrt14_ps(x))};
}
INLINE Vec rough_fourth_root(Vec a) { return {_mm512_rsqrt14_ps(_mm512_rsqrt14_ps(a.v))}; }
INLINE Vec rough_inverse(Vec a) { return {_mm512_rcp14_ps(a.v)}; }
// A quotient to within two units in the last place, where plain(b).
INLINE Vec quick_quotient(Vec a, Vec b) {
  const __m512 y = _mm512_rcp14_ps(b.v), q = _mm512_mul_ps(a.v, y);
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(q, b.v, a.v), y, q)};
}
// Whether all lanes are between 2^-38 and 2^100: far from where the quick forms fail.
INLINE bool plain(Vec a) {
  const __m512i from = _mm512_sub_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(89 << 23));
  return _mm512_cmplt_epu32_mask(from, _mm512_set1_epi32(138 << 23)) == 0xffff;
}
// The largest lane, taken as unsigned integers: of magnitudes, NaN above inf above all others.
INLINE uint32_t top_bits(Vec a) { return _mm512_reduce_max_epu32(_mm512_castps_si512(a.v)); }
INLINE float hsum(Vec a) { return _mm512_reduce_add_ps(a.v); }

// Four sums at once: cheaper than one after the other, which counts in short rows.
INLINE __m128 quarter(Vec a) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
INLINE void hsum4(const Vec (&a)[4], float (&out)[4]) {
  const __m128 low = _mm_hadd_ps(quarter(a[0]), quarter(a[1]));
  _mm_storeu_ps(out, _mm_hadd_ps(low, _mm_hadd_ps(quarter(a[2]), quarter(a[3]))));
}

INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1); }

// bf16 is the upper half of a float: rounding half to even adds 0x7fff plus the last kept bit; NaN
// stays a quiet NaN.
INLINE __m512i round_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
}
INLINE __m256i to_bf16(Vec a) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(a.v), 16));
}
INLINE __m256i to_f16(Vec a) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE Vec from_bf16(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}

INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE Vec load(const bf16* p) { return from_bf16(_mm256_loadu_si256((const __m256i*)p)); }
INLINE Vec load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
INLINE Vec load(const bf16* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
INLINE Vec load(const f16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
}

INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
INLINE void store(bf16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, to_bf16(a)); }
INLINE void store(f16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, to_f16(a)); }
INLINE void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
INLINE void store(bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(a)); }
INLINE void store(f16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first(n), to_f16(a)); }

// Past the caches; p must be aligned to the bytes stored.
INLINE void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
INLINE void stream(bf16* p, Vec a) { _mm256_stream_si256((__m256i*)p, to_bf16(a)); }
INLINE void stream(f16* p, Vec a) { _mm256_stream_si256((__m256i*)p, to_f16(a)); }
INLINE void stream_fence() { _mm_sfence(); }

// The first n lanes of a, zero in the others.
INLINE Vec keep(Vec a, int n) { return {_mm512_maskz_mov_ps(first(n), a.v)}; }

// The value after a round trip through T.
INLINE Vec rounded(const float*, Vec a) { return a; }
INLINE Vec rounded(const bf16*, Vec a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(round_bf16(a.v), _mm512_set1_epi32(-65536)))};
}
INLINE Vec rounded(const f16*, Vec a) { return {_mm512_cvtph_ps(to_f16(a))}; }

// W bytes as the 32-bit integers in the lanes.
INLINE __m512i load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
}

INLINE __m512i load_signed_bytes(const uint8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
}

// What math.inl is made of. Bounds let NaN in x through.
INLINE Vec at_least(Vec x, Vec low) { return {_mm512_max_ps(low.v, x.v)}; }
INLINE Vec at_most(Vec x, Vec high) { return {_mm512_min_ps(high.v, x.v)}; }
INLINE Vec where_negative(Vec sign, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(sign.v)), no.v, yes.v)};
}
// p 2^k for integers k in [-152, 128], rounded once, and p in [0.5, 2].
#define FASTLLM_SCALES 1
INLINE Vec scale_by_power(Vec p, Vec k) { return {_mm512_scalef_ps(p.v, k.v)}; }
// 1 / d for d in [1, 2^40].
INLINE Vec inverse(Vec d) {
  const Vec guess = {_mm512_rcp14_ps(d.v)};
  return fma(guess, {_mm512_fnmadd_ps(d.v, guess.v, _mm512_set1_ps(1.0f))}, guess);
}

// Lanes 2i and 2i + 1 exchanged.
INLINE Vec swap_pairs(Vec a) { return {_mm512_permute_ps(a.v, 0xb1)}; }

// The low byte of each lane.
INLINE void store_bytes(uint8_t* p, __m512i a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a));
}

// Entry i of 16, for the i in each lane.
INLINE Vec lookup(const float* table, __m512i index) {
  return {_mm512_permutexvar_ps(index, _mm512_loadu_ps(table))};
}
// a / b as division rounds it, from inverse = 1 / b, where nothing underflows (Markstein 1990).
INLINE Vec exact_quotient(Vec a, Vec b, Vec inverse) {
  const __m512 q = _mm512_mul_ps(a.v, inverse.v);
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(q, b.v, a.v), inverse.v, q)};
}

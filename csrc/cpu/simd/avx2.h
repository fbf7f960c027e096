// The vector vocabulary on AVX2 with FMA and F16C: 8 floats. Included inside a target region.
#define FASTLLM_WORDS "cpu/simd/words_avx2.h"  // for kernels on integers
#define FASTLLM_KEPT "cpu/simd/kept_avx2.h"    // for weights of which half is kept
constexpr int W = 8;

struct Vec {
  __m256 v;
};

INLINE Vec zero() { return {_mm256_setzero_ps()}; }
INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
INLINE Vec fma_once(Vec a, Vec b, Vec c) { return fma(a, b, c); }
INLINE Vec root(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
INLINE Vec quick_root(Vec a) { return root(a); }
INLINE Vec rough_root(Vec a) { return root(a); }
INLINE Vec rough_fourth_root(Vec a) { return root(root(a)); }
INLINE Vec rough_inverse(Vec a) { return {_mm256_div_ps(_mm256_set1_ps(1.0f), a.v)}; }
INLINE Vec quick_quotient(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
INLINE bool plain(Vec) { return true; }
// The largest lane, taken as unsigned integers: of magnitudes, NaN above inf above all others.
INLINE uint32_t top_bits(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1))));
}
INLINE float hsum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Four sums at once: cheaper than one after the other, which counts in short rows.
INLINE __m128 quarter(Vec a) {
  return _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
}
INLINE void hsum4(const Vec (&a)[4], float (&out)[4]) {
  const __m128 low = _mm_hadd_ps(quarter(a[0]), quarter(a[1]));
  _mm_storeu_ps(out, _mm_hadd_ps(low, _mm_hadd_ps(quarter(a[2]), quarter(a[3]))));
}

// Lane i is all ones where i < n.
INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// bf16 is the upper half of a float: rounding half to even adds 0x7fff plus the last kept bit; NaN
// stays a quiet NaN.
INLINE __m256i round_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(up, quiet, nan);
}
INLINE __m128i to_bf16(Vec a) {
  const __m256i high = _mm256_srli_epi32(round_bf16(a.v), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
INLINE __m128i to_f16(Vec a) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE Vec from_bf16(__m128i h) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}

// There is no masked load of 16-bit lanes before AVX-512: a tail goes through the stack.
INLINE __m128i load_halves(const void* p, int n) {
  alignas(16) uint16_t lanes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int i = 0; i < n; ++i) lanes[i] = ((const uint16_t*)p)[i];
  return _mm_load_si128((const __m128i*)lanes);
}
INLINE void store_halves(void* p, __m128i h, int n) {
  alignas(16) uint16_t lanes[8];
  _mm_store_si128((__m128i*)lanes, h);
  for (int i = 0; i < n; ++i) ((uint16_t*)p)[i] = lanes[i];
}

INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
INLINE Vec load(const bf16* p) { return from_bf16(_mm_loadu_si128((const __m128i*)p)); }
INLINE Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
INLINE Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
INLINE Vec load(const bf16* p, int n) { return from_bf16(load_halves(p, n)); }
INLINE Vec load(const f16* p, int n) { return {_mm256_cvtph_ps(load_halves(p, n))}; }

INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
INLINE void store(bf16* p, Vec a) { _mm_storeu_si128((__m128i*)p, to_bf16(a)); }
INLINE void store(f16* p, Vec a) { _mm_storeu_si128((__m128i*)p, to_f16(a)); }
INLINE void store(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first(n), a.v); }
INLINE void store(bf16* p, Vec a, int n) { store_halves(p, to_bf16(a), n); }
INLINE void store(f16* p, Vec a, int n) { store_halves(p, to_f16(a), n); }

// Past the caches; p must be aligned to the bytes stored.
INLINE void stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }
INLINE void stream(bf16* p, Vec a) { _mm_stream_si128((__m128i*)p, to_bf16(a)); }
INLINE void stream(f16* p, Vec a) { _mm_stream_si128((__m128i*)p, to_f16(a)); }
INLINE void stream_fence() { _mm_sfence(); }

// The first n lanes of a, zero in the others.
INLINE Vec keep(Vec a, int n) { return {_mm256_and_ps(a.v, _mm256_castsi256_ps(first(n)))}; }

// The value after a round trip through T.
INLINE Vec rounded(const float*, Vec a) { return a; }
INLINE Vec rounded(const bf16*, Vec a) {
  return {_mm256_castsi256_ps(_mm256_and_si256(round_bf16(a.v), _mm256_set1_epi32(-65536)))};
}
INLINE Vec rounded(const f16*, Vec a) { return {_mm256_cvtph_ps(to_f16(a))}; }

// W bytes as the 32-bit integers in the lanes.
INLINE __m256i load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}

INLINE __m256i load_signed_bytes(const uint8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
}

// What math.inl is made of. Bounds let NaN in x through.
INLINE Vec at_least(Vec x, Vec low) { return {_mm256_max_ps(low.v, x.v)}; }
INLINE Vec at_most(Vec x, Vec high) { return {_mm256_min_ps(high.v, x.v)}; }
INLINE Vec where_negative(Vec sign, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, sign.v)};
}
// p 2^k for integers k in [-152, 128], rounded once, and p in [0.5, 2]: in two factors, each of
// them a normal number.
INLINE Vec scale_by_power(Vec p, Vec k) {
  const __m256i n = _mm256_cvtps_epi32(k.v), half = _mm256_srai_epi32(n, 1);
  const __m256i one = _mm256_set1_epi32(127), rest = _mm256_sub_epi32(n, half);
  const Vec first = {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, one), 23))};
  const Vec second = {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, one), 23))};
  return p * first * second;
}
// 1 / d for d in [1, 2^40].
INLINE Vec inverse(Vec d) { return {_mm256_div_ps(_mm256_set1_ps(1.0f), d.v)}; }

// Lanes 2i and 2i + 1 exchanged.
INLINE Vec swap_pairs(Vec a) { return {_mm256_permute_ps(a.v, 0xb1)}; }

// The low byte of each lane.
INLINE void store_bytes(uint8_t* p, __m256i a) {
  const __m256i low = _mm256_shuffle_epi8(a, _mm256_set1_epi32(0x0c080400));
  const __m128i upper = _mm256_extracti128_si256(low, 1);
  _mm_storel_epi64((__m128i*)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(low), upper));
}

// Entry i of 16, for the i in each lane.
INLINE Vec lookup(const float* table, __m256i index) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
  return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)))};
}
// a / b as division rounds it, from inverse = 1 / b, where nothing underflows (Markstein 1990).
INLINE Vec exact_quotient(Vec a, Vec b, Vec inverse) {
  const __m256 q = _mm256_mul_ps(a.v, inverse.v);
  return {_mm256_fmadd_ps(_mm256_fnmadd_ps(q, b.v, a.v), inverse.v, q)};
}

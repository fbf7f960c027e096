// Integer words on AVX2: what products of codes need. A word is 32 bits.

typedef int32_t IntVec __attribute__((vector_size(4 * W)));

INLINE IntVec load_words(const void* p) { return (IntVec)_mm256_loadu_si256((const __m256i*)p); }
INLINE void store_words(void* p, IntVec a) { _mm256_storeu_si256((__m256i*)p, (__m256i)a); }
INLINE Vec to_float(IntVec a) { return {_mm256_cvtepi32_ps((__m256i)a)}; }
INLINE IntVec nearest(Vec a) { return (IntVec)_mm256_cvtps_epi32(a.v); }
INLINE IntVec bytes_as_words(const void* p) { return (IntVec)load_signed_bytes((const uint8_t*)p); }
INLINE IntVec lone_bytes(const void* p) { return (IntVec)load_bytes((const uint8_t*)p); }

// sum + a.low * b.low + a.high * b.high of the signed 16-bit halves of each word
INLINE IntVec dot_shorts(IntVec a, IntVec b, IntVec sum) {
  return sum + (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
// 2 W signed bytes as 16-bit numbers.
INLINE IntVec bytes_as_shorts(const void* p) {
  return (IntVec)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
}
INLINE int32_t sum_words(IntVec a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128((__m256i)a),
                            _mm256_extracti128_si256((__m256i)a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

// Sixteen floats, picked by the low four bits of each word.
struct Table {
  Vec low, high;
};
INLINE Table load_table(const float* p) { return {load(p), load(p + W)}; }
INLINE Table scaled(Table t, float scale) { return {t.low * set1(scale), t.high * set1(scale)}; }
INLINE Table shifted(Table t, float by) { return {t.low - set1(by), t.high - set1(by)}; }
INLINE Vec lookup(const Table& t, IntVec index) {
  const __m256 low = _mm256_permutevar8x32_ps(t.low.v, (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(t.high.v, (__m256i)index);
  return {_mm256_blendv_ps(low, high, (__m256)(index << 28))};
}

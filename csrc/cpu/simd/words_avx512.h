// Integer words on AVX-512: what products of codes need. A word is 32 bits.

typedef int32_t IntVec __attribute__((vector_size(4 * W)));

INLINE IntVec load_words(const void* p) { return (IntVec)_mm512_loadu_si512(p); }
INLINE void store_words(void* p, IntVec a) { _mm512_storeu_si512(p, (__m512i)a); }
INLINE Vec to_float(IntVec a) { return {_mm512_cvtepi32_ps((__m512i)a)}; }
INLINE IntVec nearest(Vec a) { return (IntVec)_mm512_cvtps_epi32(a.v); }
INLINE IntVec bytes_as_words(const void* p) { return (IntVec)load_signed_bytes((const uint8_t*)p); }
INLINE IntVec lone_bytes(const void* p) { return (IntVec)load_bytes((const uint8_t*)p); }

// sum + a.low * b.low + a.high * b.high of the signed 16-bit halves of each word
INLINE IntVec dot_shorts(IntVec a, IntVec b, IntVec sum) {
  return sum + (IntVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
}
// 2 W signed bytes as 16-bit numbers.
INLINE IntVec bytes_as_shorts(const void* p) {
  return (IntVec)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
}
INLINE int32_t sum_words(IntVec a) { return _mm512_reduce_add_epi32((__m512i)a); }

// Sixteen floats, picked by the low four bits of each word.
struct Table {
  Vec all;
};
INLINE Table load_table(const float* p) { return {load(p)}; }
INLINE Table scaled(Table t, float scale) { return {t.all * set1(scale)}; }
INLINE Table shifted(Table t, float by) { return {t.all - set1(by)}; }
INLINE Vec lookup(const Table& t, IntVec index) {
  return {_mm512_permutexvar_ps((__m512i)index, t.all.v)};
}

// Dot products of bytes over AVX-512's words.
#define FASTLLM_BYTE_DOTS 1

// sum + the products of the four unsigned bytes of a and the four signed ones of b, never saturated
INLINE IntVec dot_bytes(IntVec a, IntVec b, IntVec sum) {
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}

// Up to 64 bytes, zeros behind them.
INLINE IntVec load_codes(const void* p, int64_t n) {
  if (n >= 64) return load_words(p);
  return (IntVec)_mm512_maskz_loadu_epi8(n <= 0 ? 0 : (__mmask64(1) << n) - 1, p);
}
// The low nibble of each byte.
INLINE IntVec low_nibbles(IntVec a) { return a & 0x0f0f0f0f; }

// Scales [at, at + n) of those at p, bf16 or (wide) fp32; W of them at most, zeros behind them.
INLINE Vec load_scales(const void* p, bool wide, int64_t at, int64_t n) {
  const int count = n >= W ? W : n <= 0 ? 0 : int(n);
  return wide ? load((const float*)p + at, count) : load((const bf16*)p + at, count);
}
// Lane i: the lane of a that index names.
INLINE Vec picked(Vec a, IntVec index) {
  return {_mm512_permutexvar_ps((__m512i)index, a.v)};
}

// 2 W numbers as bf16: those of low, then those of high.
INLINE void store_pairs(void* p, Vec low, Vec high) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
}
// Of every 16 halves of words, half j next to half j + 8.
INLINE Vec zip_eights(Vec a) {
  const __m512i order = _mm512_set_epi16(31, 23, 30, 22, 29, 21, 28, 20, 27, 19, 26, 18, 25, 17, 24,
                                         16, 15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, _mm512_castps_si512(a.v)))};
}

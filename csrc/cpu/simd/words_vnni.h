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

// Up to four bf16 or fp32, each in the lanes that `spread` names.
INLINE Vec load_four(const void* p, bool wide, int64_t n, IntVec spread) {
  const __mmask8 mask = n >= 4 ? 15 : n <= 0 ? 0 : __mmask8((1 << n) - 1);
  __m128 four;
  if (wide)
    four = _mm_maskz_loadu_ps(mask, p);
  else
    four = _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_maskz_loadu_epi16(mask, p)), 16));
  return {_mm512_permutexvar_ps((__m512i)spread, _mm512_castps128_ps512(four))};
}

// Two of every four numbers back in their places, on AVX2: W / 2 of them make a vector.

// For each byte of kept bits, which of four numbers each lane takes.
struct Ranks {
  uint64_t of[256];
  constexpr Ranks() : of() {
    for (unsigned bits = 0; bits < 256; ++bits)
      for (unsigned j = 0, rank = 0; j < 8; ++j) {
        if (j == 4) rank = 2;
        of[bits] |= uint64_t(rank & 3) << (8 * j);
        rank += bits >> j & 1;
      }
  }
};
constexpr Ranks kRanks;

INLINE Vec in_place(__m128 v, unsigned bits) {
  const __m256i ranks = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&kRanks.of[bits]));
  const __m256i each = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  const __m256i kept = _mm256_and_si256(_mm256_set1_epi32(int(bits)), each);
  const __m256 spread = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(v), ranks);
  return {_mm256_and_ps(spread, _mm256_castsi256_ps(_mm256_cmpeq_epi32(kept, each)))};
}
INLINE Vec expand(const float* p, unsigned bits) { return in_place(_mm_loadu_ps(p), bits); }
INLINE Vec expand(const bf16* p, unsigned bits) {
  const __m128i words = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)p));
  return in_place(_mm_castsi128_ps(_mm_slli_epi32(words, 16)), bits);
}
INLINE Vec expand(const f16* p, unsigned bits) {
  return in_place(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)), bits);
}
INLINE Vec expand(const int8_t* p, unsigned bits) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return in_place(_mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(four))), bits);
}

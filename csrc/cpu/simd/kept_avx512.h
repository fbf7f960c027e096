// Two of every four numbers back in their places, on AVX-512: W / 2 of them make a vector.

INLINE Vec in_place(__m256 v, unsigned bits) {
  return {_mm512_maskz_expand_ps(__mmask16(bits), _mm512_zextps256_ps512(v))};
}
INLINE Vec expand(const float* p, unsigned bits) { return in_place(_mm256_loadu_ps(p), bits); }
INLINE Vec expand(const bf16* p, unsigned bits) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return in_place(_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)), bits);
}
INLINE Vec expand(const f16* p, unsigned bits) {
  return in_place(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), bits);
}
INLINE Vec expand(const int8_t* p, unsigned bits) {
  const __m256i words = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
  return in_place(_mm256_cvtepi32_ps(words), bits);
}

#if defined(FASTLLM_DOTS)
// 32 codes as 64 bytes. A nibble of `kept` picks a word of byte numbers, 0x80 for what is zero.
INLINE __m512i byte_places() {
  alignas(64) uint32_t words[16];
  for (int bits = 0; bits < 16; ++bits) {
    words[bits] = 0;
    for (uint32_t j = 0, rank = 0; j < 4; ++j)
      words[bits] |= ((bits >> j & 1) ? rank++ : 0x80u) << (8 * j);
  }
  return _mm512_load_si512(words);
}
INLINE __m512i expand_bytes(const int8_t* p, const uint8_t* kept, __m512i places) {
  const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)kept));
  const __m512i nibbles = _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28));
  const __m512i within = _mm512_permutexvar_epi32(nibbles, places);
  const __m512i offsets = _mm512_broadcast_i32x4(_mm_set_epi32(0x06060606, 0x04040404, 0x02020202, 0));
  const __m512i lanes = _mm512_permutexvar_epi64(
      _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0),
      _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p)));
  return _mm512_shuffle_epi8(lanes, _mm512_add_epi8(within, offsets));
}
#endif

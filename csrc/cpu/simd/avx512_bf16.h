// AVX-512 with dot products of bf16 pairs: what avx512.h has, and words of two bf16.
#include "cpu/simd/avx512.h"

#define FASTLLM_DOTS 1

// Rounding by one instruction: half to even, subnormal numbers to 0.
#define FASTLLM_ROUNDS 1
INLINE void store_quick(bf16* p, Vec a) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v));
}
INLINE void stream_quick(bf16* p, Vec a) {
  _mm256_stream_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v));
}

// n bf16 as they are, zeros behind them.
INLINE Vec load_pairs(const bf16* p, int n) {
  if (n >= 2 * W) return {_mm512_loadu_ps(p)};
  const __mmask32 mask = n <= 0 ? 0 : __mmask32((uint64_t(1) << n) - 1);
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p))};
}

// Pairs of n numbers each of two rows, or of one and zeros.
INLINE Vec zip_pairs(const bf16* low, int n) {
  return {_mm512_castsi512_ps(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), low)))};
}
INLINE Vec zip_pairs(const bf16* low, const bf16* high, int n) {
  const __m512i h = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), high));
  const __m512i l = _mm512_castps_si512(zip_pairs(low, n).v);
  return {_mm512_castsi512_ps(_mm512_or_si512(l, _mm512_slli_epi32(h, 16)))};
}

// sum + a.low * b.low + a.high * b.high
INLINE Vec dot_pairs(Vec a, Vec b, Vec sum) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}

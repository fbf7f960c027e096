// AMX tiles of signed bytes, with sums of int32 and 64 numbers a step, and of bf16 (amx.h).
//
// The left side comes from L2: its lines are asked for one step ahead, between the products.

// Asks for lines [from, from + 8) of the next step's 32.
INLINE void ask_for_lines(const float* a, int from) {
#pragma GCC unroll 8
  for (int i = from; i < from + 8; ++i) _mm_prefetch((const char*)(a + 512) + 64 * i, _MM_HINT_T0);
}

// c [32][32] (+)= a b; a [steps][32][16] words, b [steps][16][32] words.
#define FASTLLM_TILES_2X2(name, dot)                                                   \
  APART void name(int64_t steps, const float* a, const float* b, float* c, bool add) { \
    if (add) {                                                                         \
      _tile_loadd(0, c, 128);                                                          \
      _tile_loadd(1, c + 16, 128);                                                     \
      _tile_loadd(2, c + 512, 128);                                                    \
      _tile_loadd(3, c + 528, 128);                                                    \
    } else {                                                                           \
      _tile_zero(0);                                                                   \
      _tile_zero(1);                                                                   \
      _tile_zero(2);                                                                   \
      _tile_zero(3);                                                                   \
    }                                                                                  \
    for (int64_t s = 0; s < steps; ++s, a += 512, b += 512) {                          \
      ask_for_lines(a, 0);                                                             \
      _tile_loadd(4, a, 64);                                                           \
      _tile_loadd(6, b, 128);                                                          \
      dot(0, 4, 6);                                                                    \
      ask_for_lines(a, 8);                                                             \
      _tile_loadd(7, b + 16, 128);                                                     \
      dot(1, 4, 7);                                                                    \
      ask_for_lines(a, 16);                                                            \
      _tile_loadd(5, a + 256, 64);                                                     \
      dot(2, 5, 6);                                                                    \
      ask_for_lines(a, 24);                                                            \
      dot(3, 5, 7);                                                                    \
    }                                                                                  \
    _tile_stored(0, c, 128);                                                           \
    _tile_stored(1, c + 16, 128);                                                      \
    _tile_stored(2, c + 512, 128);                                                     \
    _tile_stored(3, c + 528, 128);                                                     \
  }
FASTLLM_TILES_2X2(byte_tiles_2x2, _tile_dpbssd)
FASTLLM_TILES_2X2(half_tiles_2x2, _tile_dpbf16ps)
#undef FASTLLM_TILES_2X2

// c [32][16] (+)= a b with 16 columns of b and c.
#define FASTLLM_TILES_2X1(name, dot)                                               \
  APART void name(int64_t steps, const float* a, const float* b, float* c, bool add) { \
    if (add) {                                                                     \
      _tile_loadd(0, c, 64);                                                       \
      _tile_loadd(1, c + 256, 64);                                                 \
    } else {                                                                       \
      _tile_zero(0);                                                               \
      _tile_zero(1);                                                               \
    }                                                                              \
    for (int64_t s = 0; s < steps; ++s, a += 512, b += 256) {                      \
      _tile_loadd(6, b, 64);                                                       \
      _tile_loadd(4, a, 64);                                                       \
      dot(0, 4, 6);                                                                \
      _tile_loadd(5, a + 256, 64);                                                 \
      dot(1, 5, 6);                                                                \
    }                                                                              \
    _tile_stored(0, c, 64);                                                        \
    _tile_stored(1, c + 256, 64);                                                  \
  }
FASTLLM_TILES_2X1(byte_tiles_2x1, _tile_dpbssd)
FASTLLM_TILES_2X1(half_tiles_2x1, _tile_dpbf16ps)
#undef FASTLLM_TILES_2X1

// Thirty-two numbers of 16 bits; of a table the second half repeats the first.
struct Halves {
  __m512i v;
};
INLINE Halves load_halves(const void* p) { return {_mm512_loadu_si512(p)}; }
INLINE void store_halves(void* p, Halves a) { _mm512_storeu_si512(p, a.v); }
// Entry i of the table, for the i in the low bits of each number.
INLINE Halves picked(Halves table, Halves i) { return {_mm512_permutexvar_epi16(i.v, table.v)}; }

// 32 nibbles in the low bits of as many numbers: quarter t has elements t, t + 4, t + 8, ...
INLINE Halves spread_nibbles(const uint8_t* p) {
  const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
  const __m512i by = _mm512_set_epi64(0x000c000c000c000c, 0x000c000c000c000c, 0x0008000800080008,
                                      0x0008000800080008, 0x0004000400040004, 0x0004000400040004,
                                      0, 0);
  return {_mm512_srlv_epi16(all, by)};
}
// Pairs of bf16 in their order: in that one.
INLINE Vec in_nibble_order(Vec a) {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = uint16_t(i % 8 * 4 + i / 8);
  return {_mm512_castsi512_ps(
      _mm512_permutexvar_epi16(_mm512_load_si512(order), _mm512_castps_si512(a.v)))};
}
// 2 W numbers as pairs of bf16: those of low, then those of high.
INLINE Vec paired(Vec low, Vec high) {
  return {_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high.v, low.v))};
}

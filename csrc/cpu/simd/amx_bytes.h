// AMX tiles of signed bytes: as amx.h's, with sums of int32 and 64 numbers a step.

// c [32][32] (+)= a b; a [steps][32][16] words of four bytes, b [steps][16][32] words.
APART void byte_tiles_2x2(int64_t steps, const float* a, const float* b, float* c, bool add) {
  if (add) {
    _tile_loadd(0, c, 128);
    _tile_loadd(1, c + 16, 128);
    _tile_loadd(2, c + 512, 128);
    _tile_loadd(3, c + 528, 128);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += 512, b += 512) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 128);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, b + 16, 128);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, a + 256, 64);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  _tile_stored(2, c + 512, 128);
  _tile_stored(3, c + 528, 128);
}

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

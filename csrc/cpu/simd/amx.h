// AMX tiles over AVX-512 with bf16: eight registers of 16 rows of 64 bytes.
#include "cpu/simd/avx512_bf16.h"

#define FASTLLM_TILES 1

struct alignas(64) TileConfig {
  uint8_t palette = 0, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Full tiles while it lives; then what the thread had before, which other libraries rely on.
struct TileSession {
  TileConfig before;
  INLINE_MEMBER TileSession() {
    _tile_storeconfig(&before);
    TileConfig full;
    full.palette = 1;
    for (int i = 0; i < 8; ++i) {
      full.bytes[i] = 64;
      full.rows[i] = 16;
    }
    asm volatile("" ::"r"(&full) : "memory");  // loadconfig's own operand is its first word only
    _tile_loadconfig(&full);
  }
  INLINE_MEMBER ~TileSession() {
    if (before.palette)
      _tile_loadconfig(&before);
    else
      _tile_release();
  }
};

// c [32][32] (+)= a b for steps of 32 numbers; a [steps][32][16] words, b [steps][16][32] words.
APART void tiles_2x2(int64_t steps, const float* a, const float* b, float* c, bool add) {
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
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 16, 128);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 256, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  _tile_stored(2, c + 512, 128);
  _tile_stored(3, c + 528, 128);
}

// The same with 16 rows of a and c.
APART void tiles_1x2(int64_t steps, const float* a, const float* b, float* c, bool add) {
  if (add) {
    _tile_loadd(0, c, 128);
    _tile_loadd(1, c + 16, 128);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  for (int64_t s = 0; s < steps; ++s, a += 256, b += 512) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 16, 128);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
}

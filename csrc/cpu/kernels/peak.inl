// Multiply-adds on registers alone, in chains that do not wait for one another: bf16 and int8 by
// dot products or tiles where the level has them, everything else in fp32.
//
// The numbers are as mixed as real ones. Processors save power on zeros, and those that are short
// of it (AMX on a busy socket) multiply zeros up to twice as fast as anything else.

#if defined(FASTLLM_DOTS)
#include FASTLLM_WORDS
#include "cpu/simd/words_vnni.h"
#endif

constexpr int kChains = 12;

// Random bytes, or bf16 between -1 and 1: as many as four tiles hold.
struct alignas(64) Mixed {
  uint16_t at[2048];
  explicit Mixed(bool halves) {
    uint32_t state = 1;
    for (uint16_t& x : at) {
      state = state * 1664525u + 1013904223u;
      const uint32_t r = state >> 16;
      x = uint16_t(halves ? (r & 0x80ff) | (0x3c00 + (r & 0x0300)) : r);
    }
  }
};

// A sum of these stays where numbers are usual.
struct Multiplied {
  static constexpr i64 kOperations = 2 * W;
  using Sum = Vec;
  INLINE_MEMBER static Vec step(Vec sum, Vec a, Vec b) { return fma(sum, a, b); }
};
#if defined(FASTLLM_DOTS)
struct Dotted {
  static constexpr i64 kOperations = 4 * W;
  using Sum = Vec;
  INLINE_MEMBER static Vec step(Vec sum, Vec a, Vec b) { return dot_pairs(a, b, sum); }
};
struct DottedBytes {
  static constexpr i64 kOperations = 8 * W;
  using Sum = IntVec;
  INLINE_MEMBER static IntVec step(IntVec sum, Vec a, Vec b) {
    return dot_bytes((IntVec)a.v, (IntVec)b.v, sum);
  }
};
#endif

template <class Step>
APART i64 spin(i64 rounds, const Vec& a, const Vec& b) {
  typename Step::Sum sum[kChains];
  alignas(64) float starts[W];
  for (int i = 0; i < kChains; ++i) {
    for (int j = 0; j < W; ++j) starts[j] = 1e-2f * float(i * W + j + 1);
    __builtin_memcpy(&sum[i], starts, sizeof(sum[i]));
  }
  for (i64 r = 0; r < rounds; ++r)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = Step::step(sum[i], a, b);
  for (int i = 1; i < kChains; ++i) sum[0] = sum[0] + sum[i];
  __builtin_memcpy(starts, &sum[0], sizeof(sum[0]));
  [[maybe_unused]] volatile float seen = starts[0];  // or the loop would be dropped
  return rounds * kChains * Step::kOperations;
}

i64 spin_floats(i64 rounds) {
  alignas(64) float a[W], b[W];
  for (int j = 0; j < W; ++j) a[j] = 0.9f - 0.013f * float(j), b[j] = 0.37f * float(j + 1);
  return spin<Multiplied>(rounds, load(a), load(b));
}

#if defined(FASTLLM_TILES)
#define FASTLLM_SPIN_TILES(name, dot, halves, depth)       \
  APART i64 name(i64 rounds) {                             \
    static const Mixed mixed(halves);                      \
    const TileSession session;                             \
    _tile_zero(0);                                         \
    _tile_zero(1);                                         \
    _tile_zero(2);                                         \
    _tile_zero(3);                                         \
    _tile_loadd(4, mixed.at, 64);                          \
    _tile_loadd(5, mixed.at + 512, 64);                    \
    _tile_loadd(6, mixed.at + 1024, 64);                   \
    _tile_loadd(7, mixed.at + 1536, 64);                   \
    for (i64 r = 0; r < rounds; ++r) {                     \
      dot(0, 4, 6);                                        \
      dot(1, 4, 7);                                        \
      dot(2, 5, 6);                                        \
      dot(3, 5, 7);                                        \
    }                                                      \
    return rounds * 4 * (2 * 16 * 16 * (depth));           \
  }
FASTLLM_SPIN_TILES(spin_halves, _tile_dpbf16ps, true, 32)
FASTLLM_SPIN_TILES(spin_bytes, _tile_dpbssd, false, 64)
#undef FASTLLM_SPIN_TILES
#elif defined(FASTLLM_DOTS)
i64 spin_halves(i64 rounds) {
  static const Mixed mixed(true);
  return spin<Dotted>(rounds, load((const float*)mixed.at), load((const float*)mixed.at + W));
}
i64 spin_bytes(i64 rounds) {
  static const Mixed mixed(false);
  return spin<DottedBytes>(rounds, load((const float*)mixed.at), load((const float*)mixed.at + W));
}
#endif

i64 spin_of([[maybe_unused]] int dtype, i64 rounds) {
#if defined(FASTLLM_DOTS)
  if (dtype == kBFloat16) return spin_halves(rounds);
  if (dtype == kInt8) return spin_bytes(rounds);
#endif
  return spin_floats(rounds);
}

i64 run(int dtype, i64 rounds, int threads) {
  i64 all = 0;
  parallel_for(threads, threads, [&](i64) {
    __atomic_fetch_add(&all, spin_of(dtype, rounds), __ATOMIC_RELAXED);
  });
  return all;
}

constexpr Kernels table = {run};

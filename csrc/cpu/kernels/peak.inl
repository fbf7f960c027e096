// Multiply-adds on registers alone, in chains that do not wait for one another: bf16 by dot products
// or tiles where the level has them, everything else in fp32.

constexpr int kChains = 12;

struct Multiplied {
  static constexpr i64 kOperations = 2 * W;
  INLINE_MEMBER static Vec step(Vec sum, Vec a, Vec b) { return fma(sum, a, b); }
};
#if defined(FASTLLM_DOTS)
struct Dotted {
  static constexpr i64 kOperations = 4 * W;
  INLINE_MEMBER static Vec step(Vec sum, Vec a, Vec b) { return dot_pairs(a, b, sum); }
};
#endif

template <class Step>
APART i64 spin(i64 rounds) {
  Vec sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = set1(1e-3f * float(i));
  const Vec a = set1(0.999f), b = set1(1e-3f);
  for (i64 r = 0; r < rounds; ++r)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = Step::step(sum[i], a, b);
  for (int i = 1; i < kChains; ++i) sum[0] = sum[0] + sum[i];
  alignas(64) float kept[W];
  store(kept, sum[0]);
  [[maybe_unused]] volatile float seen = kept[0];  // or the loop would be dropped
  return rounds * kChains * Step::kOperations;
}

#if defined(FASTLLM_TILES)
APART i64 spin_tiles(i64 rounds) {
  const TileSession session;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (i64 r = 0; r < rounds; ++r) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return rounds * 4 * (2 * 16 * 16 * 32);
}
#endif

i64 spin_of(int dtype, i64 rounds) {
#if defined(FASTLLM_TILES)
  if (dtype == kBFloat16) return spin_tiles(rounds);
#elif defined(FASTLLM_DOTS)
  if (dtype == kBFloat16) return spin<Dotted>(rounds);
#endif
  (void)dtype;
  return spin<Multiplied>(rounds);
}

i64 run(int dtype, i64 rounds, int threads) {
  i64 all = 0;
  parallel_for(threads, threads, [&](i64) {
    __atomic_fetch_add(&all, spin_of(dtype, rounds), __ATOMIC_RELAXED);
  });
  return all;
}

constexpr Kernels table = {run};

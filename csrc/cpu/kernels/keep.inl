// Dropout's mask: the same elements for the same seed on all backends (fastllm/ops/attention/random.py).
#pragma once
#include "cpu/kernels/math.inl"

// lowbias32 of C. Wellons, a mixer of 32 bits.
INLINE uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Which probabilities stay: a hash of seed, batch, head, query and key, the same on all backends.
typedef uint32_t Words __attribute__((vector_size(4 * W)));
constexpr uint32_t kStep = 0x9e3779b9u;
struct Keep {
  uint32_t least;
  float factor;
  explicit Keep(double p) {
    const double words = p * 4294967296.0;
    least = words >= 4294967295.0 ? 0xffffffffu : uint32_t(words);
    factor = p < 1.0 ? float(1.0 / (1.0 - p)) : 0.0f;
  }
  // What the probability of key j is multiplied by, for the queries that the rows' words name.
  INLINE_MEMBER Vec operator()(Words row, Words other, i64 j) const {
    Words x = row + kStep * uint32_t(j);
    x = ((x ^ (x >> 16)) * 0x7feb352du) ^ other;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    x = x ^ (x >> 16);
    return choose((Ints)(x >= least), set1(factor), zero());
  }
};

// What the backward pass needs, and what it does to a panel and a tile, lane by lane.

// How the work is cut, and where it lies in a slot's memory.
template <class E>
struct BackwardPlan {
  using T = typename E::T;
  static constexpr int C = E::kCols, kDeep = Traits<E>::kDeep;
  static constexpr i64 kKeys = 128, kBlock = 4, kStrip = 16;  // keys of a tile; panels
  static constexpr i64 kTasks = 32;                           // wanted, whatever the threads
  static constexpr i64 kMostSums = 64 << 20;                  // floats, where there is a choice
  Call c;
  Grid grid;
  i64 keys, tiles;
  Left<E> k, v;
  i64 rows;                // of a tile of scores
  i64 k_panels, v_panels;  // columns of the gradients, C at a time
  i64 strip, chunks, chunk;  // panels at a time; tasks for a key head; panels of a task
  int threads;
  BackwardPlan(const Call& call)
      : c(call),
        grid(c, C),
        keys(most(1, least(kKeys, c.s))),
        tiles(ceil_div(c.s, keys)),
        k(keys, c.d, care_of(c)),
        v(keys, c.dv, care_of(c)) {
    rows = touched(k, keys);
    k_panels = ceil_div(c.d, C);
    v_panels = ceil_div(c.dv, C);
    const i64 panels = grid.panels(), pairs = most(1, c.b * c.g);
    strip = most(1, least(kStrip, panels));
    chunks = least(ceil_div(panels, strip), ceil_div(kTasks, pairs));
    chunks = most(1, least(chunks, kMostSums / most(1, pairs * sums_room())));
    chunk = ceil_div(ceil_div(panels, strip), chunks) * strip;
    chunks = most(1, ceil_div(panels, most(1, chunk)));
    threads = int(most(1, least(c.threads, pairs * most(chunks, tiles))));
  }
  i64 tile_sums() const { return rows * C * (k_panels + v_panels); }
  i64 sums_room() const { return tiles * tile_sums(); }
  i64 copy_room() const {
    return most(keys, C) * ceil_div(most(c.d, c.dv) * i64(sizeof(T)), 64) * 16;
  }
  i64 right_room() const { return (E::words(c.d) + E::words(c.dv)) * C; }
  i64 across_room() const { return (k_panels + v_panels) * kDeep * C; }
  i64 panel_room() const {
    return i64(sizeof(Panel<C>)) / 4 + 8 * C + right_room() + across_room() +
           k.turned_rows() * C;
  }
  i64 slot_room() const {
    return strip * panel_room() + k.room() + k.turned_room() + v.room() +
           2 * kBlock * rows * kDeep + (4 * rows + E::words(c.dv)) * C + copy_room();
  }
  // Where each task of a key head has sums of its own, all are kept until they are added.
  i64 all_sums() const { return chunks > 1 ? c.b * c.g * chunks * sums_room() : 0; }
  i64 own_sums() const { return chunks > 1 ? 0 : sums_room(); }
  i64 room() const { return all_sums() + threads * (slot_room() + own_sums()) + 64; }
};

// The products of two right sides of `words` words, summed over these as the microkernels sum:
// equal sums cancel exactly in dP - delta.
template <class E>
APART void lane_products(const float* a, const float* b, i64 words, i64 chain, float* out) {
  constexpr int C = E::kCols;
  for (int v = 0; v < C; v += W) {
    Vec sum = zero();
    for (i64 from = 0; from < words; from += chain) {
      Vec part = zero();
      for (i64 w = from; w < least(words, from + chain); ++w) {
        const Vec x = load(a + w * C + v), y = load(b + w * C + v);
        if constexpr (Traits<E>::kPairs) {
          const Ints high = (Ints)set1(0.0f).v | int32_t(0xffff0000);
          part = fma({(Floats)((Ints)x.v << 16)}, {(Floats)((Ints)y.v << 16)}, part);
          part = fma({(Floats)((Ints)x.v & high)}, {(Floats)((Ints)y.v & high)}, part);
        } else {
          part = fma(x, y, part);
        }
      }
      sum = sum + part;
    }
    store(out + v, sum);
  }
}

// What a panel keeps for the tiles it meets.
template <int C>
struct Upstream {
  // [C]: about the denominator's log2 for each key, so that exponents are small and round little,
  // +inf where there is none; and the factor that is missing.
  float *lse, *weight;
  float *delta, *delta_rest;  // [C]: what is subtracted from dP, and what its rounding left
  double *sum, *total;        // [C]: of probabilities times dP, and of the probabilities
  float *q, *dout;       // right sides of the products with keys and values
  float *q_across, *dout_across;  // right sides of the products with probabilities
  float* dq;
};

// Scores s (times factor) and dP d of n keys become probabilities and gradients of scores: both as
// left sides, and the gradients in d as a right side.
template <class E, bool Whole, class K>
APART void differentiate(float* s, float* d, i64 n, i64 rows, float factor,
                         const Upstream<E::kCols>& up, const float* slope, float* plain,
                         [[maybe_unused]] float* left_p, [[maybe_unused]] float* left_d,
                         const K& keep) {
  constexpr int C = E::kCols;
  constexpr int kDegree = Traits<E>::kDegree;
  const Vec scale = set1(factor);
  Vec lse[kVectors], weight[kVectors], delta[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    lse[j] = neg(load(up.lse + j * W));
    weight[j] = load(up.weight + j * W);
    delta[j] = load(up.delta + j * W);
  }
  // probabilities and gradients of one vector
  const auto both = [&](i64 r, int j, Vec& p, Vec& dx) INLINE_LAMBDA {
    p = exp2_of<kDegree>(fma_once(load(s + r * C + j * W), scale, lse[j])) * weight[j];
    const Vec dp = load(d + r * C + j * W);
    const Vec rest = load(up.delta_rest + j * W);
    if constexpr (Whole) {
      dx = p * (dp - delta[j] - rest);
    } else {
      const Vec kept = keep(r, j * W);
      dx = p * (dp * kept - delta[j] - rest);
      p = p * kept;
      if (plain) store(plain + r * C + j * W, dx);
      if (slope) dx = dx * load(slope + r * C + j * W);
    }
  };
  if constexpr (Traits<E>::kPairs) {
#if defined(FASTLLM_DOTS)
    for (i64 r = 0; r < rows; r += 2) {
      Vec p[2][kVectors], dx[2][kVectors];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          p[i][j] = dx[i][j] = zero();
          if (r + i < n) both(r + i, j, p[i][j], dx[i][j]);
        }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        store(left_p + (r + i) * C / 2, behind(p[i][0], p[i][1]));
        store(left_d + (r + i) * C / 2, behind(dx[i][0], dx[i][1]));
      }
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j)
        store(d + r / 2 * C + j * W, join_pairs(dx[0][j], dx[1][j]));
    }
#endif
  } else {
    for (i64 r = 0; r < n; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        Vec p, dx;
        both(r, j, p, dx);
        store(s + r * C + j * W, p);
        store(d + r * C + j * W, dx);
      }
    for (i64 i = n * C; i < rows * C; i += W) {
      store(s + i, zero());
      store(d + i, zero());
    }
  }
}

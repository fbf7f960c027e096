// The forward pass: blocks of queries against tiles of keys, with a running maximum and sum.

// Queries of a panel so far: the base that is subtracted, and the sum of 2^(score - base).
template <int C>
struct alignas(64) Running {
  float base[C], sum[C];
};

// Probabilities of n scores (times c) in place, as the right side of the next product, and the
// running state. The base follows the maximum only when that has risen by 8 powers of two: scaling
// the sums so far is rarely worth a pass. keep(p, r, v) drops probabilities out.
template <class E, class K>
APART void fold(float* s, i64 n, [[maybe_unused]] i64 deep, float c, Running<E::kCols>& state,
                float* sums, i64 sum_rows, bool fresh, const K& keep) {
  constexpr int C = E::kCols;
  constexpr int kDegree = Traits<E>::kDegree;
  const Vec factor = set1(c);
#pragma GCC unroll 4
  for (int v = 0; v < C; v += W) {
    Vec top = set1(-kInf), other = top;
    i64 r = 0;
    for (; r + 2 <= n; r += 2) {
      top = at_least(load(s + r * C + v), top);
      other = at_least(load(s + (r + 1) * C + v), other);
    }
    if (r < n) top = at_least(load(s + r * C + v), top);
    top = larger(top, other) * factor;
    const Vec before = load(state.base + v);
    if (any(less(before + set1(8.0f), top))) {
      const Vec now = larger(before, top);
      const Ints nothing = (Ints)(now.v == set1(-kInf).v);
      const Vec share = choose(nothing, set1(1.0f), exp2_of<6>(before - now));
      store(state.base + v, now);
      store(state.sum + v, load(state.sum + v) * share);
      if (!fresh)
        for (i64 i = 0; i < sum_rows; ++i)
          store(sums + i * C + v, load(sums + i * C + v) * share);
    }
  }
  Vec base[kVectors], sum[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const Vec b = load(state.base + j * W);
    base[j] = choose((Ints)(b.v == set1(-kInf).v), zero(), neg(b));
    sum[j] = zero();
  }
  if constexpr (Traits<E>::kPairs) {
#if defined(FASTLLM_DOTS)
    for (i64 r = 0; r < deep * 2; r += 2)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const float* at = s + r * C + j * W;
        Vec low = zero(), high = zero();
        if (r < n) {
          low = exp2_of<kDegree>(fma_once(load(at), factor, base[j]));
          sum[j] = sum[j] + low;
          low = keep(low, r, j * W);
        }
        if (r + 1 < n) {
          high = exp2_of<kDegree>(fma_once(load(at + C), factor, base[j]));
          sum[j] = sum[j] + high;
          high = keep(high, r + 1, j * W);
        }
        store(s + r / 2 * C + j * W, join_pairs(low, high));
      }
#endif
  } else {
    for (i64 r = 0; r < n; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        float* at = s + r * C + j * W;
        const Vec e = exp2_of<kDegree>(fma_once(load(at), factor, base[j]));
        sum[j] = sum[j] + e;
        store(at, keep(e, r, j * W));
      }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j)
    store(state.sum + j * W, load(state.sum + j * W) + sum[j]);
}

// Rows of a panel out of columns of sums [width][C], each times its lane's scale.
template <class T, int C>
APART void write_turned(const Rows& out, const Sequence& q, const Panel<C>& p, i64 width,
                        const float* sums, const float* scale, bool empty) {
  for (int v = 0; v < C && v < p.rows; v += W) {
    const Vec factor = load(scale + v);
    for (i64 d = 0; d < width; d += W) {
      Vec block[W];
      for (int i = 0; i < W; ++i)
        block[i] = empty || d + i >= width ? zero() : load(sums + (d + i) * C + v) * factor;
      transpose(block);
      const int n = int(least(W, width - d));
      for (int l = 0; l < W && v + l < p.rows; ++l) {
        T* to = row_at<T>(out, q, p.head[v + l], p.at[v + l]) + d;
        if (n == W)
          store(to, block[l]);
        else
          store(to, block[l], n);
      }
    }
  }
}

// Sums over the keys become output rows and log-sum-exps.
template <class E, class T>
APART void finish_panel(const Call& c, const Sequence& q, const Panel<E::kCols>& p,
                        const Running<E::kCols>& state, const float* sums, bool empty) {
  constexpr int C = E::kCols;
  alignas(64) float scale[C], lse[C];
  const double worth = exponent_worth(c);
  for (int l = 0; l < C; ++l) {
    float base = state.base[l], sum = state.sum[l], share = 1.0f;
    if (c.sinks) {
      const float sink = float(c.sinks[p.head[l]] / worth), top = base < sink ? sink : base;
      if (top > -kInf) {
        share = base == -kInf ? 0.0f : __builtin_exp2f(base - top);
        sum = sum * share + __builtin_exp2f(sink - top);
        base = top;
      }
    }
    lse[l] = sum == 0.0f ? -kInf : float(double(base) * worth + __builtin_log(sum));
    scale[l] = sum == 0.0f ? 0.0f : share / sum;
  }
  write_turned<T>(c.out, q, p, c.dv, sums, scale, empty);
  if (c.lse.data)
    for (int l = 0; l < p.rows; ++l)
      *row_at<float>(c.lse, q, p.head[l], p.at[l]) = lse[l];
}

// attention_pipeline.inl
template <class Work>
struct Pipeline;

// What one forward call needs, and where it lies in a slot's memory.
template <class E>
struct ForwardPlan {
  using T = typename E::T;
  static constexpr int C = E::kCols;
  static constexpr i64 kMostPanels = 4;  // of a block: what shares the read of a tile
  Grid grid;
  i64 keys, tiles;
  Left<E> k, v;
  i64 q_words, block, blocks, score_words;
  bool own;  // each block packs its tiles: it is the only one to use them
  bool piped;  // attention_pipeline.inl
  ForwardPlan(const Call& c)
      : grid(c, C),
        keys(most(1, least(Traits<E>::kKeys, c.s))),
        tiles(ceil_div(c.s, keys)),
        k(keys, c.d, care_of(c)),
        v(keys, c.dv, care_of(c)) {
    q_words = E::words(c.d) * C;
    block = least(kMostPanels, grid.panels());
    while (block > 1 && c.b * c.g * ceil_div(grid.panels(), block) < 2 * c.threads)
      block = ceil_div(block, 2);
    blocks = ceil_div(grid.panels(), block);
    own = blocks == 1;
    piped = Traits<E>::kApart && k.height == 32 && v.turned_height == 32 && !(c.dropout > 0);
    score_words = touched(k, keys) * C;
  }
  i64 tile_room() const { return k.room() + v.turned_room(); }
  i64 copy_room(const Call& c) const {
    return most(keys, C) * ceil_div(most(c.d, c.dv) * i64(sizeof(T)), 64) * 16;
  }
  i64 panel_room() const {
    return i64(sizeof(Panel<C>) + sizeof(Running<C>)) / 4 + q_words + v.turned_rows() * C;
  }
  i64 buffers() const { return piped ? 3 : 1; }  // tiles of scores that are under way
  i64 slot_room(const Call& c) const {
    return block * panel_room() + (buffers() + 1) * score_words + copy_room(c) +
           (own ? buffers() * tile_room() : 0);
  }
};

template <class E>
struct Forward {
  using T = typename E::T;
  static constexpr int C = E::kCols;
  const Call& c;
  const ForwardPlan<E> plan;
  Overview overview;

  // Parts of a slot.
  struct Room {
    Panel<C>* panels;
    Running<C>* states;
    float *q, *sums, *scores, *bias, *tile;
    T* copy;
  };
  Room room(float* at) const {
    const i64 n = plan.block;
    Room r;
    r.panels = (Panel<C>*)at;
    at += n * i64(sizeof(Panel<C>)) / 4;
    r.states = (Running<C>*)at;
    at += n * i64(sizeof(Running<C>)) / 4;
    r.q = at;
    at += n * plan.q_words;
    r.sums = at;
    at += n * plan.v.turned_rows() * C;
    r.scores = at;
    r.bias = at + plan.buffers() * plan.score_words;
    at = r.bias + plan.score_words;
    r.copy = (T*)at;
    r.tile = at + plan.copy_room(c);
    return r;
  }

  void pack_tile(const Sequence& q, i64 g, i64 j0, T* copy, float* out) const {
    const i64 n = least(plan.keys, q.s - j0);
    i64 step;
    const T* k = keys_at<T>(c, c.k, q, g, j0, n, c.d, copy, step);
    plan.k.pack(k, step, n, out);
    const T* v = keys_at<T>(c, c.v, q, g, j0, n, c.dv, copy, step);
    plan.v.pack_turned(v, step, n, out + plan.k.room());
  }

  // One panel against one tile.
  void step(const Sequence& q, const Room& r, i64 i, i64 j0, const float* tile, bool& fresh) const {
    const Panel<C>& p = r.panels[i];
    const i64 packed = least(plan.keys, q.s - j0), n = least(packed, p.to - j0);
    const Seen sight = seen(c, p, q.b, j0, n, overview);
    if (sight == kNoneSeen) return;
    float* sums = r.sums + i * plan.v.turned_rows() * C;
    scores_of<E>(plan.k, n, tile, r.q + i * plan.q_words, r.scores);
    shape_tile(c, p, sight, r.scores, r.bias, nullptr, j0, n, n);
    const float factor = exponent_factor(c);
    const i64 deep = E::words(n);
    const auto fold_with = [&](const auto& kept) {
      fold<E>(r.scores, n, deep, factor, r.states[i], sums, plan.v.turned_rows(), fresh, kept);
    };
    if (c.dropout > 0) {
      const Keep keep(c.dropout);
      fold_with([&](Vec e, i64 row, int v) INLINE_LAMBDA {
        const Words key = (Words)load((const float*)p.key + v).v;
        return e * keep(key, (Words)load((const float*)p.other + v).v, j0 + row);
      });
    } else {
      fold_with([](Vec e, i64, int) INLINE_LAMBDA { return e; });
    }
    mix_of<E>(plan.v, n, packed, tile + plan.k.room(), r.scores, sums, !fresh);
    fresh = false;
  }

  void run_block(i64 b, i64 g, i64 first, const float* packed, float* slot) const {
    const Sequence q(c, b);
    const Room r = room(slot);
    const i64 count = least(plan.block, plan.grid.panels() - first);
    i64 from = q.s, to = 0;
    bool fresh[ForwardPlan<E>::kMostPanels];
    for (i64 i = 0; i < count; ++i) {
      Panel<C>& p = r.panels[i];
      make_panel(c, q, plan.grid, g, first + i, p);
      fresh[i] = true;
      if (p.rows == 0) continue;
      from = least(from, p.from);
      to = most(to, p.to);
      for (int l = 0; l < C; ++l) r.states[i].base[l] = -kInf, r.states[i].sum[l] = 0.0f;
      with_rows<E>(c.q, q, p, c.d, r.copy, [&](const T* src, i64 step) {
        E::pack_right(src, step, 1, p.rows, c.d, E::words(c.d), r.q + i * plan.q_words);
      });
    }
    const i64 start = from / plan.keys * plan.keys;
    if constexpr (Traits<E>::kApart)
      if (plan.piped) {
        Pipeline<Forward>{*this, q, r, g, count, plan.own ? nullptr : packed, fresh, start, to}
            .run();
      }
    for (i64 j0 = start; j0 < to && !plan.piped; j0 += plan.keys) {
      const float* tile = packed + j0 / plan.keys * plan.tile_room();
      if (plan.own) {
        pack_tile(q, g, j0, r.copy, r.tile);
        tile = r.tile;
      }
      for (i64 i = 0; i < count; ++i)
        if (r.panels[i].from < j0 + plan.keys && j0 < r.panels[i].to)
          step(q, r, i, j0, tile, fresh[i]);
    }
    for (i64 i = 0; i < count; ++i)
      if (r.panels[i].rows > 0)
        finish_panel<E, T>(c, q, r.panels[i], r.states[i],
                           r.sums + i * plan.v.turned_rows() * C, fresh[i]);
  }

  void run() {
    constexpr i64 kPacked = 7 << 19;  // words of packed keys and values at a time
    const i64 pairs = c.b * c.g, pair_room = plan.own ? 0 : plan.tiles * plan.tile_room();
    const i64 chunk = plan.own ? pairs : most(1, least(pairs, kPacked / most(1, pair_room)));
    const i64 slot_room = plan.slot_room(c);
    const int threads = int(most(1, least(c.threads, chunk * most(plan.blocks, plan.tiles))));
    const Scratch scratch(overview.room() + chunk * pair_room + threads * slot_room);
    float *packed = scratch.data() + overview.room(), *slots = packed + chunk * pair_room;
    overview.look(c, C, c.threads, scratch.data());
    for (i64 p0 = 0; p0 < pairs; p0 += chunk) {
      const i64 count = least(chunk, pairs - p0);
      if (!plan.own)
        deal(count * plan.tiles, threads, [&](i64 slot, i64 item) {
          const i64 pair = p0 + item / plan.tiles, j0 = item % plan.tiles * plan.keys;
          const Sequence q(c, pair / c.g);
          if (j0 < q.s)
            pack_tile(q, pair % c.g, j0, room(slots + slot * slot_room).copy,
                      packed + item * plan.tile_room());
        });
      deal(count * plan.blocks, threads, [&](i64 slot, i64 item) {
        [[maybe_unused]] const typename E::Session session;
        const i64 pair = p0 + item / plan.blocks;
        const i64 block = plan.blocks - 1 - item % plan.blocks;  // causal: the longest first
        run_block(pair / c.g, pair % c.g, block * plan.block,
                  packed + item / plan.blocks * pair_room, slots + slot * slot_room);
      });
    }
  }
};

template <class E>
INLINE void run_forward(const Call& c) {
  const ForwardPlan<E> plan(c);
  Forward<E>{c, plan, Overview(c, plan.grid, E::kCols, plan.keys)}.run();
}

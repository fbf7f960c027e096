// The forward pass where products have a unit of their own: while that makes the scores of a later
// panel and the sums of an earlier one, the vector units make this one's probabilities.
#if defined(FASTLLM_TILES)

// Results too small for a normal number are 0 while it lives: scalef takes 100 ns for others.
struct FlushSmall {
  unsigned before = _mm_getcsr();
  INLINE_MEMBER FlushSmall() { _mm_setcsr(before | 0x8000); }
  INLINE_MEMBER ~FlushSmall() { _mm_setcsr(before); }
};

// 2^t to 3e-6, which bf16 does not see; 0 far below, NaN at NaN.
INLINE Vec exp2_short(Vec t) {
  constexpr float kFour[] = {1.0f, 0.6930448412895203f, 0.2412802129983902f, 0.052242472767829895f,
                             0.013426685705780983f};
  const Vec above = {_mm512_reduce_ps(t.v, 9)};  // t less its floor
  return {_mm512_scalef_ps(polynomial(above, kFour).v, t.v)};
}

// 32 rows of a product: c (+)= a b.
struct TileJob {
  const float *a, *b;
  float* c;
  bool add;
};

// What is known of a panel and a tile on their way.
struct Item {
  i64 panel, j0, rows, valid;  // rows: whole steps of 32 keys; valid: keys that exist
  const float* tile;
  float* scores;  // then probabilities
  Seen sight;
  alignas(64) float top[32];  // the largest score of each query
};

// Probabilities of an item, two keys at a time.
struct Exponentials {
  float* s;
  i64 at = 0, rows;
  Vec factor, base[2], sum[2];
  INLINE_MEMBER void advance() {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const float* from = s + at * 32 + j * W;
      const Vec low = exp2_short(fma_once(load(from), factor, base[j]));
      const Vec high = exp2_short(fma_once(load(from + 32), factor, base[j]));
      sum[j] = sum[j] + (low + high);
      store(s + at * 16 + j * W, join_pairs(low, high));
    }
    at += 2;
  }
};

// One step of a job, 32 words deep.
INLINE void tile_step(const float* a, const float* b) {
  _tile_loadd(4, a, 64);
  _tile_loadd(6, b, 128);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, b + 16, 128);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, a + 256, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}
INLINE void tile_begin(const TileJob& job) {
  if (job.add) {
    _tile_loadd(0, job.c, 128);
    _tile_loadd(1, job.c + 16, 128);
    _tile_loadd(2, job.c + 512, 128);
    _tile_loadd(3, job.c + 528, 128);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}
INLINE void tile_end(const TileJob& job) {
  _tile_stored(0, job.c, 128);
  _tile_stored(1, job.c + 16, 128);
  _tile_stored(2, job.c + 512, 128);
  _tile_stored(3, job.c + 528, 128);
}

// Jobs, with some exponentials beside each step. top, or null: takes the largest of each column
// of what the jobs made.
INLINE void run_jobs(const TileJob* jobs, i64 count, i64 steps, Exponentials& e, i64 pairs,
                     bool last, float* top) {
  Vec most_of[2] = {set1(-kInf), set1(-kInf)};
  const auto look = [&](const float* c) INLINE_LAMBDA {
#pragma GCC unroll 8
    for (int r = 0; r < 32; ++r)
      for (int j = 0; j < 2; ++j) most_of[j] = at_least(load(c + r * 32 + j * W), most_of[j]);
  };
  for (i64 i = 0; i < count; ++i) {
    const TileJob& job = jobs[i];
    tile_begin(job);
    // one job late: what tiles have just stored has to reach the cache before it can be loaded
    if (top && i > 0) look(jobs[i - 1].c);
    for (i64 s = 0; s < steps; ++s) {
      tile_step(job.a + s * 512, job.b + s * 512);
      const i64 end = least(e.rows, e.at + 2 * pairs);
      while (e.at < end) e.advance();
    }
    tile_end(job);
  }
  while (e.at < e.rows && last) e.advance();
  if (top && count > 0) look(jobs[count - 1].c);
  if (top)
    for (int j = 0; j < 2; ++j) store(top + j * W, most_of[j]);
}

// A step of the pipeline: each of the three may be missing.
struct Slot {
  TileJob sums[8], scores[8];
  i64 sum_jobs = 0, sum_steps = 0, score_jobs = 0, score_steps = 0;
  float* top = nullptr;         // of the scores, if nothing else is done to them
  float* exponents = nullptr;   // scores that become probabilities
  i64 rows = 0;
  float factor = 0;
  Running<32>* state = nullptr;
};
APART void run_slot(const Slot& slot) {
  Exponentials e;
  e.s = slot.exponents;
  e.rows = slot.rows;
  e.factor = set1(slot.factor);
  for (int j = 0; j < 2; ++j) {
    const Vec base = slot.state ? load(slot.state->base + j * W) : zero();
    e.base[j] = choose((Ints)(base.v == set1(-kInf).v), zero(), neg(base));
    e.sum[j] = zero();
  }
  const i64 steps = slot.sum_jobs * slot.sum_steps + slot.score_jobs * slot.score_steps;
  const i64 pairs = ceil_div(slot.rows / 2, most(1, steps));
  run_jobs(slot.sums, slot.sum_jobs, slot.sum_steps, e, pairs, false, nullptr);
  run_jobs(slot.scores, slot.score_jobs, slot.score_steps, e, pairs, true, slot.top);
  if (slot.state)
    for (int j = 0; j < 2; ++j)
      store(slot.state->sum + j * W, load(slot.state->sum + j * W) + e.sum[j]);
}

// Panels of a block against the tiles that they see. `Work` is Forward<Tiles>.
template <class Work>
struct Pipeline {
  const Work& work;
  const Sequence& q;
  const typename Work::Room& r;
  i64 g, count;
  const float* packed;  // tiles, or null: each is packed when its turn comes
  bool* fresh;          // [count]: nothing was summed yet
  i64 j0, to, turn = 0, made = 0, tiles = 0;
  const float* tile = nullptr;

  // The next panel and tile of which something is seen.
  bool next(Item& item) {
    const auto& plan = work.plan;
    for (; j0 < to; j0 += plan.keys, turn = 0, tile = nullptr) {
      while (turn < count) {
        const i64 i = turn++;
        const auto& p = r.panels[i];
        if (p.from >= j0 + plan.keys || j0 >= p.to) continue;
        const i64 n = least(least(plan.keys, q.s - j0), p.to - j0);
        item.sight = seen(work.c, p, q.b, j0, n, work.overview);
        if (item.sight == kNoneSeen) continue;
        if (!tile) open_tile();
        item.panel = i;
        item.j0 = j0;
        item.rows = ceil_div(n, 32) * 32;
        item.valid = least(item.rows, q.s - j0);
        item.tile = tile;
        item.scores = r.scores + made++ % 3 * plan.score_words;
        return true;
      }
    }
    return false;
  }
  // Three tiles are in use at a time: of the sums, the exponentials and the scores.
  void open_tile() {
    const auto& plan = work.plan;
    if (packed) {
      tile = packed + j0 / plan.keys * plan.tile_room();
      return;
    }
    float* own = r.tile + tiles++ % 3 * plan.tile_room();
    work.pack_tile(q, g, j0, r.copy, own);
    tile = own;
  }

  float* sums_of(i64 panel) const { return r.sums + panel * work.plan.v.turned_rows() * 32; }

  void add_sums(Slot& slot, const Item& item) {
    const auto& v = work.plan.v;
    const i64 deep = Tiles::words(least(work.plan.keys, q.s - item.j0)) * 32;
    slot.sum_jobs = v.turned_panels();
    slot.sum_steps = item.rows / 32;
    for (i64 i = 0; i < slot.sum_jobs; ++i)
      slot.sums[i] = {item.tile + work.plan.k.room() + i * deep, item.scores,
                      sums_of(item.panel) + i * 1024, !fresh[item.panel]};
    fresh[item.panel] = false;
  }
  void add_scores(Slot& slot, Item& item) {
    const auto& k = work.plan.k;
    slot.score_jobs = item.rows / 32;
    slot.score_steps = k.words / 16;
    for (i64 i = 0; i < slot.score_jobs; ++i)
      slot.scores[i] = {item.tile + i * 32 * k.words, r.q + item.panel * work.plan.q_words,
                        item.scores + i * 1024, false};
    slot.top = plain(item) ? item.top : nullptr;
  }

  // Are the scores what the products are?
  bool plain(const Item& item) const {
    const auto& p = r.panels[item.panel];
    return item.sight == kAllSeen && !shaped(work.c) && item.j0 >= p.all_from &&
           item.j0 + item.rows <= p.all_to;
  }
  void shape_scores(Item& item) const {
    if (plain(item)) return;
    shape_tile(work.c, r.panels[item.panel], item.sight, item.scores, r.bias, nullptr, item.j0,
               item.valid, item.rows);
    for (int v = 0; v < 32; v += W) {
      Vec top = set1(-kInf);
      for (i64 i = 0; i < item.rows; ++i) top = at_least(load(item.scores + i * 32 + v), top);
      store(item.top + v, top);
    }
  }

  // Moves the base of a panel up to new scores, if they are far above it; `late`, if any, is what
  // the sums so far lack.
  bool settle(const Item& item, const Item* late) {
    Running<32>& state = r.states[item.panel];
    const Vec factor = set1(exponent_factor(work.c));
    bool flushed = false;
    for (int v = 0; v < 32; v += W) {
      const Vec top = load(item.top + v) * factor, before = load(state.base + v);
      if (!any(less(before + set1(8.0f), top))) continue;
      if (late && late->panel == item.panel && !flushed) {
        Slot slot;
        add_sums(slot, *late);
        run_slot(slot);
        flushed = true;
      }
      const Vec now = larger(before, top);
      const Ints nothing = (Ints)(now.v == set1(-kInf).v);
      const Vec share = choose(nothing, set1(1.0f), exp2_of<6>(before - now));
      store(state.base + v, now);
      store(state.sum + v, load(state.sum + v) * share);
      float* sums = sums_of(item.panel);
      if (!fresh[item.panel])
        for (i64 i = 0; i < work.plan.v.turned_rows(); ++i)
          store(sums + i * 32 + v, load(sums + i * 32 + v) * share);
    }
    return flushed;
  }

  void run() {
    const FlushSmall flush;
    Item items[3];
    Item *late = nullptr, *now = nullptr, *soon = items;
    for (i64 turn_of = 0; soon || now || late; ++turn_of) {
      if (soon && !next(*soon)) soon = nullptr;
      if (now && settle(*now, late)) late = nullptr;
      Slot slot;
      if (late) add_sums(slot, *late);
      if (soon) add_scores(slot, *soon);
      if (now) {
        slot.exponents = now->scores;
        slot.rows = now->rows;
        slot.factor = exponent_factor(work.c);
        slot.state = &r.states[now->panel];
      }
      run_slot(slot);
      if (soon) shape_scores(*soon);
      late = now;
      now = soon;
      if (soon) soon = items + (turn_of + 1) % 3;
    }
  }
};
#endif

// The backward pass: each task owns queries, reads all keys that they see, and sums what it adds to
// the gradients of keys and values in memory of its own; these sums are added in a fixed order.

template <class E>
struct Backward {
  using T = typename E::T;
  using Plan = BackwardPlan<E>;
  static constexpr int C = E::kCols, kDeep = Traits<E>::kDeep;
  const Gradient& a;
  const Call& c;
  const Plan plan;
  Overview overview;

  // Parts of a slot.
  struct Room {
    Panel<C>* panels;
    float *strip, *k, *k_turned, *v, *left_p, *left_d, *s, *d, *bias, *slope, *out, *sums;
    T* copy;
  };
  Room room(float* at) const {
    Room r;
    r.panels = (Panel<C>*)at;
    at += plan.strip * i64(sizeof(Panel<C>)) / 4;
    r.strip = at;
    at += plan.strip * (plan.panel_room() - i64(sizeof(Panel<C>)) / 4);
    r.k = at;
    r.k_turned = r.k + plan.k.room();
    r.v = r.k_turned + plan.k.turned_room();
    r.left_p = r.v + plan.v.room();
    r.left_d = r.left_p + Plan::kBlock * plan.rows * kDeep;
    r.s = r.left_d + Plan::kBlock * plan.rows * kDeep;
    r.d = r.s + plan.rows * C;
    r.bias = r.d + plan.rows * C;
    r.slope = r.bias + plan.rows * C;
    r.out = r.slope + plan.rows * C;
    r.copy = (T*)(r.out + E::words(c.dv) * C);
    r.sums = (float*)r.copy + plan.copy_room();
    return r;
  }
  Upstream<C> upstream(const Room& r, i64 i) const {
    float* at = r.strip + i * (plan.panel_room() - i64(sizeof(Panel<C>)) / 4);
    Upstream<C> u;
    u.lse = at;
    u.weight = at + C;
    u.delta = at + 2 * C;
    u.delta_rest = at + 3 * C;
    u.sum = (double*)(at + 4 * C);
    u.total = (double*)(at + 6 * C);
    u.q = at + 8 * C;
    u.dout = u.q + E::words(c.d) * C;
    u.q_across = u.dout + E::words(c.dv) * C;
    u.dout_across = u.q_across + plan.k_panels * kDeep * C;
    u.dq = u.dout_across + plan.v_panels * kDeep * C;
    return u;
  }

  void pack_rows_of(const Rows& from, const Sequence& q, const Panel<C>& p, i64 width, T* copy,
                    float* right, float* across) const {
    with_rows<E>(from, q, p, width, copy, [&](const T* src, i64 step) {
      E::pack_right(src, step, 1, p.rows, width, E::words(width), right);
      for (i64 at = 0; at < width; at += C)
        E::pack_right(src + at, 1, step, least(C, width - at), p.rows, kDeep, across + at * kDeep);
    });
  }

  void begin_panel(const Sequence& q, const Room& r, i64 g, i64 index, i64 i) const {
    Panel<C>& p = r.panels[i];
    make_panel(c, q, plan.grid, g, index, p);
    if (p.rows == 0) return;
    const Upstream<C> u = upstream(r, i);
    const double worth = exponent_worth(c);
    for (int l = 0; l < C; ++l) {
      const float lse = l < p.rows ? *row_at<float>(c.lse, q, p.head[l], p.at[l]) : -kInf;
      const double bits = lse / worth;
      const double keys = double(most(1, p.last[l] - p.first[l] + 1));
      u.lse[l] = lse == -kInf ? kInf : float(bits - __builtin_log2(keys));
      u.weight[l] = lse == -kInf ? 1.0f : float(__builtin_exp2(double(u.lse[l]) - bits));
    }
    pack_rows_of(c.q, q, p, c.d, r.copy, u.q, u.q_across);
    pack_rows_of(a.grad_out, q, p, c.dv, r.copy, u.dout, u.dout_across);
    for (int l = 0; l < C; ++l) {
      u.delta[l] = u.delta_rest[l] = 0.0f;
      u.sum[l] = u.total[l] = 0.0;
    }
    if (!precise(p)) {
      with_rows<E>(c.out, q, p, c.dv, r.copy, [&](const T* src, i64 step) {
        E::pack_right(src, step, 1, p.rows, c.dv, E::words(c.dv), r.out);
      });
      lane_products<E>(r.out, u.dout, E::words(c.dv), plan.v.chain, u.delta);
    }
    for (i64 at = 0; at < plan.k.turned_rows() * C; at += W) store(u.dq + at, zero());
  }

  // Are delta and the denominator summed again over the keys? The output and lse have them, but
  // rounded. What these gradients are compared with is not, and short rows are soon done.
  bool precise() const {
    const bool few = std::is_same_v<T, float> && c.t * c.s <= 2048;
    return few || c.sinks || c.dropout > 0 || a.dmask;
  }
  // Does the panel see the keys of one tile only? Then the products for it are there already.
  bool alone(const Panel<C>& p) const {
    return p.from < p.to && p.from / plan.keys == (p.to - 1) / plan.keys;
  }
  bool precise(const Panel<C>& p) const {
    return precise() || (!Traits<E>::kPairs && alone(p));
  }

  void finish_delta(const Sequence& q, const Panel<C>& p, const Upstream<C>& u) const {
    const double worth = exponent_worth(c);
    for (int l = 0; l < C; ++l) {
      if (l >= p.rows || u.lse[l] == kInf) {
        u.delta[l] = 0.0f;
        if (l < p.rows && a.sink.data) *row_at<float>(a.sink, q, p.head[l], p.at[l]) = 0.0f;
        continue;
      }
      double share = 0;
      if (c.sinks)
        share = __builtin_exp2(c.sinks[p.head[l]] / worth - double(u.lse[l])) * u.weight[l];
      double delta = u.delta[l];
      if (precise(p)) {
        const double total = u.total[l] + share;
        u.weight[l] = float(u.weight[l] / total);
        delta = u.sum[l] / total;
        share /= total;
      }
      if (a.grad_lse.data) delta -= *row_at<float>(a.grad_lse, q, p.head[l], p.at[l]);
      if (a.sink.data) *row_at<float>(a.sink, q, p.head[l], p.at[l]) = -float(share * delta);
      u.delta[l] = float(delta);
      u.delta_rest[l] = float(delta - double(u.delta[l]));
    }
  }

  void write_mask(const Sequence& q, const Panel<C>& p, i64 j0, i64 n, const float* dx) const {
    for (i64 r = 0; r < n; r += W)
      for (int v = 0; v < p.rows; v += W) {
        Vec block[W];
        for (int i = 0; i < W; ++i) block[i] = r + i < n ? load(dx + (r + i) * C + v) : zero();
        transpose(block);
        for (int l = 0; l < W && v + l < p.rows; ++l)
          store(a.dmask + q.b * a.dmask_b + p.head[v + l] * a.dmask_h +
                    p.at[v + l] * a.dmask_row + j0 + r,
                block[l], int(least(W, n - r)));
      }
  }

  // Scores and dP of one panel and one tile; false: nothing is seen.
  bool multiply(const Sequence& q, const Room& r, i64 i, i64 j0, i64 n, float* s, float* d) const {
    const Panel<C>& p = r.panels[i];
    if (p.to <= j0 || p.from >= j0 + n) return false;
    const Seen sight = seen(c, p, q.b, j0, n, overview);
    if (sight == kNoneSeen) return false;
    const Upstream<C> u = upstream(r, i);
    scores_of<E>(plan.k, n, r.k, u.q, s);
    scores_of<E>(plan.v, n, r.v, u.dout, d);
    shape_tile(c, p, sight, s, r.bias, c.softcap > 0 ? r.slope : nullptr, j0, n, n);
    return true;
  }

  // The sums of a tile's probabilities, alone and times dP.
  void add_delta(const Panel<C>& p, const Upstream<C>& u, const float* s, const float* d, i64 j0,
                 i64 n) const {
    const Keep keep(c.dropout);
    const Vec factor = set1(exponent_factor(c));
    for (int v = 0; v < C; v += W) {
      const Words key = (Words)load((const float*)p.key + v).v;
      const Words other = (Words)load((const float*)p.other + v).v;
      const Vec lse = neg(load(u.lse + v)), weight = load(u.weight + v);
      Wide sum = {}, total = {};
      for (i64 row = 0; row < n; ++row) {
        const Vec t = fma_once(load(s + row * C + v), factor, lse);
        Vec e = exp2_of<Traits<E>::kDegree>(t) * weight;
        total += __builtin_convertvector(e.v, Wide);
        if (c.dropout > 0) e = e * keep(key, other, j0 + row);
        sum += __builtin_convertvector(e.v, Wide) *
               __builtin_convertvector(load(d + row * C + v).v, Wide);
      }
      for (int l = 0; l < W; ++l) {
        u.sum[v + l] += sum[l];
        u.total[v + l] += total[l];
      }
    }
  }

  // Probabilities and gradients of scores of one panel and one tile, and what they add to dq.
  bool meet(const Sequence& q, const Room& r, i64 i, i64 j0, i64 n, float* left_p,
            float* left_d) const {
    const Panel<C>& p = r.panels[i];
    const Upstream<C> u = upstream(r, i);
    float *s = Traits<E>::kPairs ? r.s : left_p, *d = Traits<E>::kPairs ? r.d : left_d;
    const bool seen = multiply(q, r, i, j0, n, s, d);
    if (precise(p) && alone(p) && p.from / plan.keys == j0 / plan.keys) {
      if (seen) add_delta(p, u, s, d, j0, n);
      finish_delta(q, p, u);
    }
    if (!seen) return false;
    const i64 rows = touched(plan.k, n);
    const bool cap = c.softcap > 0;
    const float factor = exponent_factor(c);
    float* plain = a.dmask ? r.bias : nullptr;
    const float* slope = cap ? r.slope : nullptr;
    if (c.dropout > 0) {
      const Keep keep(c.dropout);
      differentiate<E, false>(s, d, n, rows, factor, u, slope, plain, left_p, left_d,
                              [&](i64 row, int v) INLINE_LAMBDA {
                                const Words key = (Words)load((const float*)p.key + v).v;
                                const Words other = (Words)load((const float*)p.other + v).v;
                                return keep(key, other, j0 + row);
                              });
    } else if (plain || slope) {
      differentiate<E, false>(s, d, n, rows, factor, u, slope, plain, left_p, left_d,
                              [](i64, int) INLINE_LAMBDA { return set1(1.0f); });
    } else {
      differentiate<E, true>(s, d, n, rows, factor, u, slope, plain, left_p, left_d,
                             [](i64, int) INLINE_LAMBDA { return set1(1.0f); });
    }
    if (a.dmask) write_mask(q, p, j0, n, r.bias);
    mix_of<E>(plan.k, n, n, r.k_turned, d, u.dq, true);
    return true;
  }

  // sums [column panel][rows][C] += what the panels of a block say of a tile.
  void add_across(i64 n, int panels, const float* left, const float* const* right, i64 columns,
                  float* sums) const {
    const float* b[Plan::kBlock];
    for (i64 j = 0; j < columns; ++j) {
      for (int i = 0; i < panels; ++i) b[i] = right[i] + j * kDeep * C;
      const int step = plan.k.chain <= 16 ? 1 : panels;  // panels that are summed in one go
      for (i64 k = 0; k < plan.k.panels(n); ++k)
        for (int i = 0; i < panels; i += step)
          Traits<E>::across(plan.k.height, step,
                            left + (i * plan.rows + k * plan.k.height) * kDeep, plan.rows * kDeep,
                            b + i, sums + (j * plan.rows + k * plan.k.height) * C);
    }
  }

  // Packs what a tile has of keys and values; returns its keys.
  i64 pack_tile(const Sequence& q, const Room& r, i64 g, i64 j0, bool turned) const {
    const i64 n = least(plan.keys, q.s - j0);
    i64 step;
    const T* k = keys_at<T>(c, c.k, q, g, j0, n, c.d, r.copy, step);
    plan.k.pack(k, step, n, r.k);
    if (turned) plan.k.pack_turned(k, step, n, r.k_turned);
    const T* v = keys_at<T>(c, c.v, q, g, j0, n, c.dv, r.copy, step);
    plan.v.pack(v, step, n, r.v);
    return n;
  }

  void run_strip(const Sequence& q, i64 g, i64 first, i64 count, const Room& r,
                 float* sums) const {
    i64 from = q.s, to = 0;
    for (i64 i = 0; i < count; ++i) {
      begin_panel(q, r, g, first + i, i);
      from = least(from, r.panels[i].from);
      to = most(to, r.panels[i].to);
    }
    const i64 start = from / plan.keys * plan.keys;
    bool shared = false;  // is there a panel whose sums take more than one tile?
    for (i64 i = 0; i < count; ++i)
      shared = shared || (r.panels[i].from < r.panels[i].to && !alone(r.panels[i]));
    if (precise() && shared)
      for (i64 j0 = start; j0 < to; j0 += plan.keys) {
        const i64 n = pack_tile(q, r, g, j0, false);
        for (i64 i = 0; i < count; ++i)
          if (!alone(r.panels[i]) && multiply(q, r, i, j0, n, r.s, r.d))
            add_delta(r.panels[i], upstream(r, i), r.s, r.d, j0, n);
      }
    for (i64 i = 0; i < count; ++i)
      if (r.panels[i].rows > 0 && !(precise(r.panels[i]) && alone(r.panels[i])))
        finish_delta(q, r.panels[i], upstream(r, i));
    for (i64 j0 = start; j0 < to; j0 += plan.keys) {
      const i64 n = pack_tile(q, r, g, j0, true), tile = j0 / plan.keys;
      float* dk = sums + tile * plan.tile_sums();
      float* dv = dk + plan.rows * C * plan.k_panels;
      for (i64 at = 0; at < count; at += Plan::kBlock) {
        const float *q_right[Plan::kBlock], *dout_right[Plan::kBlock];
        int met = 0;
        for (i64 i = at; i < least(count, at + Plan::kBlock); ++i) {
          const i64 left = met * plan.rows * kDeep;
          if (!meet(q, r, i, j0, n, r.left_p + left, r.left_d + left)) continue;
          const Upstream<C> u = upstream(r, i);
          q_right[met] = u.q_across;
          dout_right[met++] = u.dout_across;
        }
        if (met == 0) continue;
        add_across(n, met, r.left_p, dout_right, plan.v_panels, dv);
        add_across(n, met, r.left_d, q_right, plan.k_panels, dk);
      }
    }
    alignas(64) float scale[C];
    for (int l = 0; l < C; ++l) scale[l] = float(c.scale);
    for (i64 i = 0; i < count; ++i)
      if (r.panels[i].rows > 0)
        write_turned<T>(a.dq, q, r.panels[i], c.d, upstream(r, i).dq, scale, false);
  }

  // Rows of a tile's gradients: the sums of all tasks in their order, rounded once.
  void write_keys(const Rows& out, const Sequence& q, i64 g, i64 tile, const float* sums,
                  i64 columns, i64 width, float factor) const {
    const i64 j0 = tile * plan.keys, n = least(plan.keys, q.s - j0);
    const Sequence keys = q.as_keys();
    for (i64 r = 0; r < n; ++r) {
      T* to = row_at<T>(out, keys, g, j0 + r);
      for (i64 j = 0; j < columns; ++j)
        for (int v = 0; v < C && j * C + v < width; v += W) {
          const float* at = sums + (j * plan.rows + r) * C + v;
          Vec sum = load(at);
          for (i64 i = 1; i < plan.chunks; ++i) sum = sum + load(at + i * plan.sums_room());
          const i64 left = width - j * C - v;
          if (left >= W)
            store(to + j * C + v, sum * set1(factor));
          else
            store(to + j * C + v, sum * set1(factor), int(left));
        }
    }
  }
  void write_tile(const Sequence& q, i64 g, i64 tile, const float* sums) const {
    if (tile * plan.keys >= q.s) return;
    write_keys(a.dk, q, g, tile, sums + tile * plan.tile_sums(), plan.k_panels, c.d,
               float(c.scale));
    write_keys(a.dv, q, g, tile,
               sums + tile * plan.tile_sums() + plan.rows * C * plan.k_panels, plan.v_panels, c.dv,
               1.0f);
  }

  void run() {
    const Scratch scratch(overview.room() + (a.room ? 0 : plan.room()));
    overview.look(c, C, c.threads, scratch.data());
    float* room_of = a.room ? a.room : scratch.data() + overview.room();
    float* all = (float*)(((uintptr_t)room_of + 63) / 64 * 64);
    float* slots = all + plan.all_sums();
    const i64 slot_room = plan.slot_room() + plan.own_sums();
    deal(c.b * c.g * plan.chunks, plan.threads, [&](i64 slot, i64 item) {
      [[maybe_unused]] const typename E::Session session;
      const i64 pair = item / plan.chunks, chunk = plan.chunks - 1 - item % plan.chunks;
      const Sequence q(c, pair / c.g);
      const Room r = room(slots + slot * slot_room);
      float* sums = plan.chunks > 1
                        ? all + (pair * plan.chunks + chunk) * plan.sums_room()
                        : r.sums;
      for (i64 i = 0; i < plan.sums_room(); i += W) store(sums + i, zero());
      const i64 end = least(plan.grid.panels(), (chunk + 1) * plan.chunk);
      for (i64 at = chunk * plan.chunk; at < end; at += plan.strip)
        run_strip(q, pair % c.g, at, least(plan.strip, end - at), r, sums);
      if (plan.chunks == 1)
        for (i64 tile = 0; tile < plan.tiles; ++tile) write_tile(q, pair % c.g, tile, sums);
    });
    if (plan.chunks == 1) return;
    deal(c.b * c.g * plan.tiles, plan.threads, [&](i64, i64 item) {
      const i64 pair = item / plan.tiles;
      write_tile(Sequence(c, pair / c.g), pair % c.g, item % plan.tiles,
                 all + pair * plan.chunks * plan.sums_room());
    });
  }
};

template <class E>
INLINE void run_backward(const Gradient& a) {
  const BackwardPlan<E> plan(a.call);
  Backward<E>{a, a.call, plan, Overview(a.call, plan.grid, E::kCols, plan.keys)}.run();
}

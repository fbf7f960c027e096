// Few queries against many keys: keys and values are read where they lie, once for all queries of
// their head, by tasks that each have a stretch of them; what these found is merged in order.

constexpr i64 kFewQueries = 16, kStretch = 512, kGlance = 64;  // rows; keys of a task, of a step
constexpr int kTogether = W == 16 ? 4 : 2;  // queries that the registers hold at a time

template <class T>
struct Decode {
  const Call& c;
  const i64 group, rows, stretches, width, room;  // rows: queries of a key head
  explicit Decode(const Call& call)
      : c(call),
        group(c.h / c.g),
        rows(group * c.t),
        stretches(most(1, ceil_div(c.s, kStretch))),
        width(ceil_div(c.dv, W) * W),
        room(rows * (width + 2)) {}

  // What a task needs: queries, scores of a step, and what it found: [rows] bases, sums, outputs.
  i64 slot_room() const { return rows * (ceil_div(c.d, W) * W + kGlance); }

  const T* key_at(const Rows& from, const Sequence& q, i64 g, i64 j) const {
    if (!c.pages) return row_at<T>(from, q.as_keys(), g, j);
    const int32_t* table = c.pages + q.b * c.pages_row;
    return (const T*)from.data + table[j / c.page] * from.batch + g * from.head +
           j % c.page * from.row;
  }

  // Asks for rows of what is read next: they lie pages apart, where the hardware does not look.
  INLINE_MEMBER static void ask(const T* rows, i64 step, i64 width, int count) {
    constexpr i64 kLine = 64 / i64(sizeof(T));
    for (int i = 0; i < count; ++i)
      for (i64 at = 0; at < width; at += kLine) __builtin_prefetch(rows + i * step + at, 0, 2);
  }

  // Products of four keys, or of one, with some queries.
  template <int Keys, int Queries>
  INLINE_MEMBER static void products(const T* k, i64 step, const float* q, i64 q_step, i64 d,
                                     float* out) {
    Vec sum[Queries][4];
#pragma GCC unroll 4
    for (int i = 0; i < Queries; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = zero();
    const auto add = [&](auto lanes, i64 at) INLINE_LAMBDA {
      Vec key[Keys];
#pragma GCC unroll 4
      for (int j = 0; j < Keys; ++j) key[j] = get(k + j * step + at, lanes);
#pragma GCC unroll 4
      for (int i = 0; i < Queries; ++i) {
        const Vec query = load(q + i * q_step + at);
#pragma GCC unroll 4
        for (int j = 0; j < Keys; ++j) sum[i][j] = fma(key[j], query, sum[i][j]);
      }
    };
    i64 at = 0;
    for (; at + W <= d; at += W) add(All{}, at);
    if (at < d) add(First{int(d - at)}, at);
#pragma GCC unroll 4
    for (int i = 0; i < Queries; ++i) {
      float four[4];
      hsum4(sum[i], four);
      for (int j = 0; j < Keys; ++j) out[i * kGlance + j] = four[j];
    }
  }
  // Scores of n keys; next: the values of these keys, or null.
  template <int Queries>
  void scores(const T* k, i64 n, const float* q, i64 q_step, float* out,
                           const T* next) const {
    const i64 step = c.k.row;
    i64 j = 0;
    for (; j + 4 <= n; j += 4) {
      if (next) ask(next + j * c.v.row, c.v.row, c.dv, 4);
      products<4, Queries>(k + j * step, step, q, q_step, c.d, out + j);
    }
    for (; j < n; ++j) products<1, Queries>(k + j * step, step, q, q_step, c.d, out + j);
  }

  // out [Queries][width] += weights [Queries][kGlance] times n rows of values.
  template <int Queries, int Vectors, class L>
  INLINE_MEMBER void mix_part(const T* v, i64 n, const float* weights, float* out, L lanes,
                              const T* next) const {
    const i64 step = c.v.row;
    Vec sum[Queries][Vectors];
#pragma GCC unroll 4
    for (int i = 0; i < Queries; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[i][j] = load(out + i * width + j * W);
    for (i64 r = 0; r < n; ++r) {
      if (next) ask(next + r * c.k.row, c.k.row, c.d, 1);
      Vec value[Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) value[j] = get(v + r * step + j * W, lanes);
#pragma GCC unroll 4
      for (int i = 0; i < Queries; ++i) {
        const Vec w = set1(weights[i * kGlance + r]);
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) sum[i][j] = fma(w, value[j], sum[i][j]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < Queries; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) store(out + i * width + j * W, sum[i][j]);
  }
  // next: the keys after these, or null.
  template <int Queries>
  void mix(const T* v, i64 n, const float* weights, float* out, const T* next) const {
    i64 at = 0;
    for (; at + 4 * W <= c.dv; at += 4 * W, next = nullptr)
      mix_part<Queries, 4>(v + at, n, weights, out + at, All{}, next);
    for (; at + W <= c.dv; at += W, next = nullptr)
      mix_part<Queries, 1>(v + at, n, weights, out + at, All{}, next);
    if (at < c.dv) mix_part<Queries, 1>(v + at, n, weights, out + at, First{int(c.dv - at)}, next);
  }

  // f(first, std::integral_constant) for the rows, some at a time.
  template <class F>
  INLINE_MEMBER void in_parts(const F& f) const {
    i64 i = 0;
    for (; i + kTogether <= rows; i += kTogether) f(i, std::integral_constant<int, kTogether>{});
    for (; i < rows; ++i) f(i, std::integral_constant<int, 1>{});
  }

  i64 head_of(i64 g, i64 row) const { return g * group + row / c.t; }
  i64 place_of(i64 row) const { return row % c.t; }

  // Scores of one row and n keys, from j0 on, as exponents' natural logarithms; -inf where unseen.
  void shape_row(const Sequence& q, i64 g, i64 row, i64 j0, i64 n, float* s) const {
    const i64 h = head_of(g, row), i = place_of(row), place = i + q.diagonal;
    const i64 first = c.left < 0 ? 0 : place - c.left, last = c.right < 0 ? q.s : place + c.right;
    const float slope = c.slopes ? c.slopes[q.b * c.slopes_b + h] : 0.0f;
    const i64 size = mask_bytes(c.mask_type);
    const char* mask =
        (const char*)c.mask + (q.b * c.mask_b + h * c.mask_h + i * c.mask_row) * size;
    const Vec scale = set1(float(c.scale)), cap = set1(c.softcap);
    float steps[W];
    for (int l = 0; l < W; ++l) steps[l] = float(l);
    for (i64 r = 0; r < n; r += W) {
      Vec x = load(s + r) * scale;
      if (c.softcap > 0) x = tanh(div(x, cap)) * cap;
      const Vec at = load(steps) + set1(float(j0 + r - place));
      if (c.slopes) x = x - set1(slope) * abs(at);
      if (c.mask_type != kMaskNone) {
        float bias[W] = {};
        const int count = int(least(W, n - r));
        if (c.mask_col == 1)
          store(bias, mask_values(c.mask_type, mask + (j0 + r) * size, count));
        else
          for (int l = 0; l < count; ++l)
            bias[l] = mask_value(c.mask_type, mask + (j0 + r + l) * c.mask_col * size);
        x = x + load(bias);
      }
      store(s + r, x);
    }
    for (i64 r = 0; r < n; ++r)
      if (j0 + r < first || j0 + r > last) s[r] = -kInf;
    for (i64 r = n; r < ceil_div(n, W) * W; ++r) s[r] = -kInf;
  }

  // Scores become weights; the row's base and sum follow, and its output so far is scaled.
  void fold_row(float* s, i64 n, float factor, float& base, float& sum, float* out) const {
    Vec top = set1(-kInf);
    for (i64 r = 0; r < n; r += W) top = at_least(load(s + r), top);
    const float now = largest(top) * factor;
    if (base + 8.0f < now) {
      const float share = base == -kInf ? 0.0f : __builtin_exp2f(base - now);
      sum *= share;
      for (i64 d = 0; d < width; d += W) store(out + d, load(out + d) * set1(share));
      base = now;
    }
    const Vec minus = set1(base == -kInf ? 0.0f : -base);
    Vec total = zero();
    for (i64 r = 0; r < n; r += W) {
      const Vec e = exp2_of<6>(fma_once(load(s + r), set1(factor), minus));
      total = total + e;
      store(s + r, e);
    }
    sum += hsum(total);
  }

  // found: bases [rows], sums [rows], outputs [rows][width].
  void run_stretch(i64 b, i64 g, i64 stretch, float* slot, float* found) const {
    const Sequence q(c, b);
    const i64 q_step = ceil_div(c.d, W) * W;
    float *queries = slot, *weights = slot + rows * q_step;
    float *bases = found, *sums = found + rows, *out = found + 2 * rows;
    for (i64 i = 0; i < rows; ++i) {
      bases[i] = -kInf;
      sums[i] = 0.0f;
      const T* from = row_at<T>(c.q, q, head_of(g, i), place_of(i));
      for (i64 d = 0; d < c.d; d += W)
        store(queries + i * q_step + d,
              c.d - d >= W ? load(from + d) : load(from + d, int(c.d - d)));
    }
    for (i64 i = 0; i < rows * width; i += W) store(out + i, zero());
    // the raw products are exponents where nothing else is done to them
    const bool plain = c.scale > 0 && !(c.softcap > 0) && !c.slopes &&
                       c.mask_type == kMaskNone && c.left < 0;
    // keys that all rows see, and the first and last that any row sees
    const i64 whole = c.right < 0 ? q.s : q.diagonal + c.right + 1;
    const i64 first = c.left < 0 ? 0 : most(0, q.diagonal - c.left);
    const i64 last = c.right < 0 ? q.s : least(q.s, q.diagonal + c.t + c.right);
    const i64 end = least(last, (stretch + 1) * kStretch);
    for (i64 j0 = most(first, stretch * kStretch), n; j0 < end; j0 += n) {
      n = least(kGlance, end - j0);
      if (c.pages) n = least(n, c.page - j0 % c.page);
      const bool raw = plain && j0 + n <= whole;
      const T *k = key_at(c.k, q, g, j0), *v = key_at(c.v, q, g, j0);
      const T* next = j0 + 2 * n <= end ? key_at(c.k, q, g, j0 + n) : nullptr;
      in_parts([&](i64 i, auto count) {
        scores<decltype(count)::value>(k, n, queries + i * q_step, q_step, weights + i * kGlance,
                                       i == 0 ? v : nullptr);
      });
      const double factor = raw ? c.scale * 1.4426950408889634 : 1.4426950408889634;
      for (i64 i = 0; i < rows; ++i) {
        float* s = weights + i * kGlance;
        if (raw)
          for (i64 r = n; r < ceil_div(n, W) * W; ++r) s[r] = -kInf;
        else
          shape_row(q, g, i, j0, n, s);
        fold_row(s, n, float(factor), bases[i], sums[i], out + i * width);
      }
      in_parts([&](i64 i, auto count) {
        mix<decltype(count)::value>(v, n, weights + i * kGlance, out + i * width,
                                    i == 0 ? next : nullptr);
      });
    }
  }

  // One row out of what the stretches found.
  void merge_row(i64 b, i64 g, i64 row, const float* found) const {
    const Sequence q(c, b);
    const i64 h = head_of(g, row), i = place_of(row);
    float base = -kInf;
    for (i64 s = 0; s < stretches; ++s) {
      const float other = found[s * room + row];
      base = base < other ? other : base;
    }
    const float sink = c.sinks ? c.sinks[h] * kLog2e : -kInf;
    base = base < sink ? sink : base;
    double sum = sink == -kInf ? 0.0 : __builtin_exp2f(sink - base);
    for (i64 s = 0; s < stretches; ++s) {
      const float from = found[s * room + row];
      if (from > -kInf) sum += double(found[s * room + rows + row]) * __builtin_exp2f(from - base);
    }
    const float whole = sum == 0.0 ? 0.0f : float(1.0 / sum);
    T* to = row_at<T>(c.out, q, h, i);
    for (i64 d = 0; d < c.dv; d += W) {
      Vec out = zero();
      for (i64 s = 0; s < stretches; ++s) {
        const float from = found[s * room + row];
        if (from == -kInf) continue;
        const float* part = found + s * room + 2 * rows + row * width;
        out = fma(load(part + d), set1(__builtin_exp2f(from - base)), out);
      }
      out = out * set1(whole);
      if (c.dv - d >= W)
        store(to + d, out);
      else
        store(to + d, out, int(c.dv - d));
    }
    if (c.lse.data)
      *row_at<float>(c.lse, q, h, i) =
          sum == 0.0 ? -kInf : float((double(base) + __builtin_log2(sum)) * 0.6931471805599453);
  }

  void run() const {
    const i64 pairs = c.b * c.g, items = pairs * stretches;
    const i64 slot = ceil_div(slot_room(), 16) * 16;
    const i64 bytes = items * least(kStretch, most(1, c.s)) * (c.d + c.dv) * i64(sizeof(T));
    const int threads = int(most(1, least(items, useful_threads(bytes, c.threads))));
    const Scratch scratch(threads * slot + items * room);
    float* found = scratch.data() + threads * slot;
    deal(items, threads, [&](i64 at, i64 item) {
      const i64 pair = item / stretches;
      run_stretch(pair / c.g, pair % c.g, item % stretches, scratch.data() + at * slot,
                  found + item * room);
    });
    const int mergers = int(least(threads, useful_threads(items * room * 4, c.threads)));
    deal(pairs, mergers, [&](i64, i64 pair) {
      for (i64 row = 0; row < rows; ++row)
        merge_row(pair / c.g, pair % c.g, row, found + pair * stretches * room);
    });
  }
};

// Is this a call for it: few queries of equal number, and enough keys to be worth the cut?
INLINE bool decodes(const Call& c) {
  return c.h / c.g * c.t <= kFewQueries && !c.q_starts && !(c.dropout > 0);
}

INLINE void run_decode(const Call& c) {
  if (c.dtype == kFloat32) Decode<float>(c).run();
  if (c.dtype == kBFloat16) Decode<bf16>(c).run();
  if (c.dtype == kFloat16) Decode<f16>(c).run();
}

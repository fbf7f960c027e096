// Which queries lie in a panel, what they may see, and what is done to their scores.
#include "cpu/kernels/keep.inl"

constexpr float kLog2e = 1.44269504f;

// One entry of the batch: its queries and keys among the rows of the tensors.
struct Sequence {
  i64 b, t, s, q0, k0, diagonal;
  Sequence(const Call& c, i64 b_) : b(b_), t(c.t), s(c.s), q0(0), k0(0) {
    if (c.q_starts) {
      q0 = c.q_starts[b];
      t = c.q_starts[b + 1] - q0;
    }
    if (c.k_starts) {
      k0 = c.k_starts[b];
      s = c.k_starts[b + 1] - k0;
    }
    if (c.lengths) s = c.lengths[b];
    diagonal = c.diagonal + (c.bottom_right ? s - t : 0);
  }
  // For row_at: the keys' rows instead of the queries'.
  Sequence as_keys() const {
    Sequence keys = *this;
    keys.q0 = k0;
    return keys;
  }
};

template <class T>
INLINE T* row_at(const Rows& rows, const Sequence& q, i64 head, i64 i) {
  return (T*)rows.data + q.b * rows.batch + head * rows.head + (q.q0 + i) * rows.row;
}
// Key rows j .. j + n of one head, and the step from one to the next. Those in pages are copied.
template <class T>
INLINE const T* keys_at(const Call& c, const Rows& rows, const Sequence& q, i64 head, i64 j, i64 n,
                        i64 width, T* copy, i64& step) {
  step = rows.row;
  if (!c.pages)
    return (const T*)rows.data + q.b * rows.batch + head * rows.head + (q.k0 + j) * step;
  const int32_t* table = c.pages + q.b * c.pages_row;
  for (i64 i = 0; i < n; ++i) {
    const i64 at = j + i;
    const T* from = (const T*)rows.data + table[at / c.page] * rows.batch + head * rows.head +
                    at % c.page * rows.row;
    __builtin_memcpy(copy + i * width, from, width * i64(sizeof(T)));
  }
  step = width;
  return copy;
}

// The rows of one key/value head, cut into panels of C. Short sequences share panels with those of
// the other query heads of the group.
struct Grid {
  i64 group, units, rows, panels_each;
  bool shared;
  Grid(const Call& c, i64 width) {
    group = c.h / c.g;
    const bool free = c.left < 0 && c.right < 0;
    shared = group > 1 && c.t % width != 0 && (free || c.t < 2 * width);
    units = shared ? 1 : group;
    rows = shared ? group * c.t : c.t;
    panels_each = ceil_div(rows, width);
  }
  INLINE_MEMBER i64 panels() const { return units * panels_each; }
};

template <int C>
struct alignas(64) Panel {
  int32_t first[C], last[C];   // keys that a lane sees, both inclusive
  float place[C], slope[C];    // i + diagonal, and ALiBi's slope
  uint32_t key[C], other[C];   // of the dropout generator
  const char* mask[C];
  i64 head[C], at[C];          // what the lane is
  i64 from, to;                // keys that any lane sees
  i64 all_from, all_to;        // keys that all lanes see
  int rows;
  bool one_mask, one_head;
};

INLINE i64 mask_bytes(int type) { return type == kMaskBool ? 1 : type == kFloat32 ? 4 : 2; }

template <int C>
APART void make_panel(const Call& c, const Sequence& q, const Grid& grid, i64 g, i64 index,
                      Panel<C>& p) {
  const i64 unit = index / grid.panels_each, r0 = index % grid.panels_each * C;
  const i64 rows = grid.shared ? grid.group * q.t : q.t;
  p.rows = int(most(0, least(C, rows - r0)));
  p.from = p.all_to = q.s;
  p.to = p.all_from = 0;
  p.one_mask = true;
  if (p.rows == 0) return;
  for (int l = 0; l < C; ++l) {
    if (l >= p.rows) {  // lanes beyond the rows do what the last row does
      p.first[l] = p.first[l - 1], p.last[l] = p.last[l - 1];
      p.place[l] = p.place[l - 1], p.slope[l] = p.slope[l - 1];
      p.mask[l] = p.mask[l - 1];
      p.key[l] = p.key[l - 1], p.other[l] = p.other[l - 1];
      p.head[l] = p.head[l - 1], p.at[l] = p.at[l - 1];
      continue;
    }
    const i64 r = r0 + l, h = g * grid.group + (grid.shared ? r / q.t : unit);
    const i64 i = grid.shared ? r % q.t : r, place = i + q.diagonal;
    const i64 first = c.left < 0 ? 0 : most(0, place - c.left);
    const i64 last = c.right < 0 ? q.s - 1 : least(q.s - 1, place + c.right);
    const bool empty = last < first;
    p.head[l] = h, p.at[l] = i;
    p.first[l] = empty ? 0 : int32_t(first);
    p.last[l] = empty ? -1 : int32_t(last);
    p.place[l] = float(place);
    p.slope[l] = c.slopes ? c.slopes[q.b * c.slopes_b + h] : 0.0f;
    const uint32_t a = mixed(uint32_t(c.seed) + kStep * uint32_t((c.first_batch + q.b) * c.h + h));
    p.key[l] = mixed(a + kStep * uint32_t(i));
    p.other[l] = mixed(mixed(uint32_t(uint64_t(c.seed) >> 32) ^ a) ^ p.key[l]);
    p.mask[l] = (const char*)c.mask +
                (q.b * c.mask_b + h * c.mask_h + i * c.mask_row) * mask_bytes(c.mask_type);
    p.one_mask = p.one_mask && p.mask[l] == p.mask[0];
    if (!empty) {
      p.from = least(p.from, first);
      p.to = most(p.to, last + 1);
    }
    p.all_from = most(p.all_from, empty ? q.s : first);
    p.all_to = least(p.all_to, empty ? 0 : last + 1);
  }
  p.one_head = p.head[0] == p.head[p.rows - 1];
}

// The queries of a panel (or the rows of another tensor of their shape) as the right side.
template <class E, class T, int C, class F>
INLINE void with_rows(const Rows& from, const Sequence& q, const Panel<C>& p, i64 width, T* copy,
                      const F& f) {
  if (p.one_head) return f(row_at<T>(from, q, p.head[0], p.at[0]), from.row);
  for (int l = 0; l < p.rows; ++l)
    __builtin_memcpy(copy + l * width, row_at<T>(from, q, p.head[l], p.at[l]),
                     width * i64(sizeof(T)));
  f(copy, width);
}

// ---- masks

enum Seen { kAllSeen, kSomeSeen, kNoneSeen };

// n bytes of 0 or 1: do any, do all say yes?
APART void look_at(const char* m, i64 n, i64 step, bool& any_yes, bool& all_yes) {
  i64 i = 0;
  if (step == 1) {
    uint64_t either = 0, both = ~uint64_t(0);
    for (; i + 8 <= n; i += 8) {
      uint64_t word;
      __builtin_memcpy(&word, m + i, 8);
      either |= word;
      both &= word;
    }
    any_yes = any_yes || either != 0;
    all_yes = all_yes && (i == 0 || both == 0x0101010101010101u);
  }
  for (; i < n; ++i) {
    any_yes = any_yes || m[i * step];
    all_yes = all_yes && m[i * step];
  }
}

// What a bool mask lets C queries, from a multiple of C on, see of each tile: looked up by every
// head that the mask is broadcast to. So a mask that is causal costs little more than is_causal.
struct Overview {
  i64 batches = 0, heads = 0, bands = 0, tiles = 0, keys = 0;
  uint8_t* sights = nullptr;
  Overview(const Call& c, const Grid& grid, i64 width, i64 tile_keys) {
    if (c.mask_type != kMaskBool || c.mask_row == 0 || grid.shared) return;
    batches = c.mask_b ? c.b : 1;
    heads = c.mask_h ? c.h : 1;
    bands = ceil_div(c.t, width);
    tiles = ceil_div(c.s, tile_keys);
    keys = tile_keys;
  }
  i64 room() const { return ceil_div(batches * heads * bands * tiles, 64) * 16; }  // floats
  void look(const Call& c, i64 width, int threads, float* memory) {
    if (batches == 0) return;
    sights = (uint8_t*)memory;
    parallel_for(batches * heads * bands, threads, [&](i64 item) {
      const i64 first = item % bands * width, rows = least(width, c.t - first);
      const i64 at = item / bands / heads * c.mask_b + item / bands % heads * c.mask_h;
      const char* mask = (const char*)c.mask + at + first * c.mask_row;
      for (i64 tile = 0; tile < tiles; ++tile) {
        const i64 j0 = tile * keys, n = least(keys, c.s - j0);
        bool any_yes = false, all_yes = true;
        for (i64 i = 0; i < rows && !(any_yes && !all_yes); ++i)
          look_at(mask + i * c.mask_row + j0 * c.mask_col, n, c.mask_col, any_yes, all_yes);
        sights[item * tiles + tile] = any_yes ? (all_yes ? kAllSeen : kSomeSeen) : kNoneSeen;
      }
    });
  }
  Seen at(i64 b, i64 head, i64 row, i64 width, i64 j0) const {
    const i64 entry = (batches > 1 ? b : 0) * heads + (heads > 1 ? head : 0);
    return Seen(sights[(entry * bands + row / width) * tiles + j0 / keys]);
  }
};

// What a bool mask lets a panel see of a tile; other masks are not looked at.
template <int C>
INLINE Seen seen(const Call& c, const Panel<C>& p, i64 b, i64 j0, i64 n, const Overview& known) {
  if (c.mask_type == kMaskNone) return kAllSeen;
  if (c.mask_type != kMaskBool) return kSomeSeen;
  if (known.sights) return known.at(b, p.head[0], p.at[0], C, j0);
  bool any_yes = false, all_yes = true;
  for (int l = 0; l < (p.one_mask ? 1 : p.rows) && !(any_yes && !all_yes); ++l)
    if (l == 0 || p.mask[l] != p.mask[l - 1])
      look_at(p.mask[l] + j0 * c.mask_col, n, c.mask_col, any_yes, all_yes);
  return any_yes ? (all_yes ? kAllSeen : kSomeSeen) : kNoneSeen;
}

INLINE float mask_value(int type, const char* p) {
  if (type == kMaskBool) return *p ? 0.0f : -kInf;
  float out[W] = {};
  if (type == kFloat32) store(out, load((const float*)p, 1));
  if (type == kBFloat16) store(out, load((const bf16*)p, 1));
  if (type == kFloat16) store(out, load((const f16*)p, 1));
  return out[0];
}
// n neighbours of a mask, as what is added to scores.
INLINE Vec mask_values(int type, const char* p, int n) {
  if (type == kFloat32) return n >= W ? load((const float*)p) : load((const float*)p, n);
  if (type == kBFloat16) return n >= W ? load((const bf16*)p) : load((const bf16*)p, n);
  if (type == kFloat16) return n >= W ? load((const f16*)p) : load((const f16*)p, n);
  uint8_t bytes[W] = {};
  __builtin_memcpy(bytes, p, n >= W ? W : n);
  const Ints yes = (Ints)load_bytes(bytes) != 0;
  return choose(yes, zero(), set1(-kInf));
}

// The mask of a tile, turned: [n][C].
template <int C>
APART void turn_mask(const Call& c, const Panel<C>& p, i64 j0, i64 n, float* out) {
  const i64 size = mask_bytes(c.mask_type);
  if (p.one_mask) {
    for (i64 r = 0; r < n; ++r) {
      const Vec same = set1(mask_value(c.mask_type, p.mask[0] + (j0 + r) * c.mask_col * size));
      for (int v = 0; v < C; v += W) store(out + r * C + v, same);
    }
    return;
  }
  if (c.mask_col != 1) {
    for (i64 r = 0; r < n; ++r)
      for (int l = 0; l < C; ++l)
        out[r * C + l] = l > 0 && p.mask[l] == p.mask[l - 1]
                             ? out[r * C + l - 1]
                             : mask_value(c.mask_type, p.mask[l] + (j0 + r) * c.mask_col * size);
    return;
  }
  for (i64 r = 0; r < n; r += W)
    for (int v = 0; v < C; v += W) {
      Vec block[W];
      for (int l = 0; l < W; ++l)
        block[l] = mask_values(c.mask_type, p.mask[v + l] + (j0 + r) * size, int(least(W, n - r)));
      transpose(block);
      for (int i = 0; i < W && r + i < n; ++i) store(out + (r + i) * C + v, block[i]);
    }
}

// ---- scores

// The fewer scores there are, the less their errors are averaged out; small calls are soon done.
INLINE Care care_of(const Call& c) {
  constexpr i64 kSmall = 1 << 22;  // products
  const i64 scores = c.t * c.s;
  const i64 chain = scores < (1 << 12) ? 8 : scores <= (1 << 14) ? 16 : 1 << 20;
  return {chain, scores <= (1 << 14) && c.b * c.h * scores * (c.d + c.dv) <= kSmall};
}

// Is there more to a score than a positive scale and what is seen?
INLINE bool shaped(const Call& c) {
  const bool added = c.mask_type != kMaskNone && c.mask_type != kMaskBool;
  return !(c.scale > 0) || c.softcap > 0 || c.slopes || added;
}
// What a stored score is multiplied by to be an exponent of 2, and what such an exponent is worth
// in natural logarithms: exact for the factor as rounded, which counts where scores are large.
INLINE float exponent_factor(const Call& c) {
  return shaped(c) ? kLog2e : float(c.scale * 1.4426950408889634);
}
INLINE double exponent_worth(const Call& c) {
  return (shaped(c) ? 1.0 : c.scale) / double(exponent_factor(c));
}

INLINE Vec hide(Vec x, Ints first, Ints last, int32_t j) {
  return choose((first <= j) & (last >= j), x, set1(-kInf));
}

// Products q k become scores, -inf where unseen. bias: the turned mask or null;
// slope: takes the softcap's derivative, or null.
template <int C>
APART void shape(const Call& c, const Panel<C>& p, float* s, const float* bias, float* slope,
                 i64 j0, i64 n) {
  const Vec scale = set1(float(c.scale)), cap = set1(c.softcap),
            inverse_cap = set1(1.0f / c.softcap);
  for (int v = 0; v < C; v += W) {
    const Ints first = (Ints)load((const float*)p.first + v).v;
    const Ints last = (Ints)load((const float*)p.last + v).v;
    const Vec place = load(p.place + v), alibi = load(p.slope + v);
    for (i64 r = 0; r < n; ++r) {
      float* at = s + r * C + v;
      Vec x = load(at) * scale;
      if (c.softcap > 0) {
        const Vec t = tanh(x * inverse_cap);
        x = t * cap;
        if (slope) store(slope + r * C + v, fma(neg(t), t, set1(1.0f)));
      }
      if (c.slopes) x = x - alibi * abs(place - set1(float(j0 + r)));
      if (bias) x = x + load(bias + r * C + v);
      store(at, hide(x, first, last, int32_t(j0 + r)));
    }
  }
}

// Only what is seen, by a turned bool mask, too: the scale is left to the exponential.
template <int C>
APART void hide_tile(const Panel<C>& p, float* s, const float* bias, i64 j0, i64 n) {
  for (int v = 0; v < C; v += W) {
    const Ints first = (Ints)load((const float*)p.first + v).v;
    const Ints last = (Ints)load((const float*)p.last + v).v;
    for (i64 r = 0; r < n; ++r) {
      float* at = s + r * C + v;
      Vec x = load(at);
      if (bias) x = choose(less(load(bias + r * C + v), zero()), set1(-kInf), x);
      store(at, hide(x, first, last, int32_t(j0 + r)));
    }
  }
}

// Whatever this call does to the scores of a panel and a tile: n keys that exist, in `rows` rows,
// of which the others are hidden.
template <int C>
INLINE void shape_tile(const Call& c, const Panel<C>& p, Seen sight, float* s, float* bias,
                       float* slope, i64 j0, i64 n, i64 rows) {
  const bool masked = sight == kSomeSeen;
  if (masked) {
    turn_mask(c, p, j0, n, bias);
    for (i64 i = n * C; i < rows * C; i += W) store(bias + i, zero());
  }
  if (shaped(c))
    shape(c, p, s, masked ? bias : nullptr, slope, j0, rows);
  else if (masked || j0 < p.all_from || j0 + rows > p.all_to)
    hide_tile(p, s, masked ? bias : nullptr, j0, rows);
}

// Few queries against many keys: keys and values are read where they lie, once for all queries of
// their head, by tasks that each have a stretch of them; what these found is merged in order.

constexpr i64 kStretch = 512;  // keys of a task

INLINE Reader reader(const Codes& codes, int dtype) {
  const bool grouped = codes.groups > 1 || codes.zeros.data;
#if defined(FASTLLM_DOTS)
  if (!grouped && dtype != kFloat32) {
    if (codes.kind == kByteCodes) return digits_of<DigitBytes>(8);
    if (codes.kind == kNibbleCodes) return digits_of<DigitNibbles>(4);
  }
#endif
  if (codes.kind == kByteCodes)
    return grouped ? reader_of<ByteCodes<true>>(8) : reader_of<ByteCodes<false>>(8);
  if (codes.kind == kNibbleCodes)
    return grouped ? reader_of<NibbleCodes<true>>(4) : reader_of<NibbleCodes<false>>(4);
  if (dtype == kFloat32) return reader_of<Numbers<float>>(32);
  return dtype == kBFloat16 ? reader_of<Numbers<bf16>>(16) : reader_of<Numbers<f16>>(16);
}

// Keys or values as they are read: how, and where.
struct Stored {
  Reader read;
  const Rows& rows;
  const Codes& codes;
  i64 width, padded, room;  // numbers of a row, also in whole blocks; floats of a step's scales
  Stored(const Rows& rows_, const Codes& codes_, i64 width_, int dtype)
      : read(reader(codes_, dtype)), rows(rows_), codes(codes_), width(width_) {
    padded = ceil_div(width, read.block) * read.block;
    room = codes.kind == kPlain ? 0 : ceil_div(kGlance * codes.groups, W) * W;
  }
  i64 bytes(i64 numbers) const { return ceil_div(numbers * read.bits, 8); }
  i64 step() const { return codes.kind == kPlain ? bytes(rows.row) : rows.row; }
};

struct Decode {
  const Call& c;
  const Stored k, v;
  const i64 group, rows, stretches, width, room;  // rows: queries of a key head
  explicit Decode(const Call& call)
      : c(call),
        k(call.k, call.k_codes, call.d, call.dtype),
        v(call.v, call.v_codes, call.dv, call.dtype),
        group(c.h / c.g),
        rows(group * c.t),
        stretches(most(1, ceil_div(c.s, kStretch))),
        width(v.padded),
        room(rows * (width + 2)) {}

  // What a task needs: queries, scores of a step, its scales and zeros; and what it found: [rows]
  // bases, sums, outputs.
  i64 slot_room() const { return rows * (k.padded + kGlance) + 2 * (k.room + v.room); }

  template <class T>
  const T* key_at(const Rows& from, const Sequence& q, i64 g, i64 j) const {
    if (!c.pages) return row_at<T>(from, q.as_keys(), g, j);
    const int32_t* table = c.pages + q.b * c.pages_row;
    return (const T*)from.data + table[j / c.page] * from.batch + g * from.head +
           j % c.page * from.row;
  }
  const char* bytes_at(const Stored& from, const Sequence& q, i64 g, i64 j) const {
    const i64 size = from.codes.kind == kPlain ? from.read.bits / 8 : 1;
    Rows in_bytes = from.rows;
    for (i64* stride : {&in_bytes.batch, &in_bytes.head, &in_bytes.row}) *stride *= size;
    return key_at<char>(in_bytes, q, g, j);
  }

  // Scales, or zeros, of n rows in fp32, [n][groups].
  void widen(const Stored& of, const Rows& from, const Sequence& q, i64 g, i64 j0, i64 n,
             float* out) const {
    with_type(of.codes.scale_type, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* p = key_at<T>(from, q, g, j0);
      const i64 groups = of.codes.groups, lines = from.row == groups ? 1 : n;
      const i64 count = lines == 1 ? n * groups : groups;
      for (i64 r = 0; r < lines; ++r, p += from.row, out += groups)
        for (i64 i = 0; i < count; i += W)
          if (count - i >= W)
            store(out + i, load(p + i));
          else
            store(out + i, load(p + i, int(count - i)), int(count - i));
    });
  }
  // A step's rows of keys or values, with their scales at `scales`.
  Step step_of(const Stored& of, const Sequence& q, i64 g, i64 j0, i64 n, float* scales) const {
    Step s{};
    s.rows = rows, s.n = n, s.width = of.width, s.padded = of.padded;
    s.from = bytes_at(of, q, g, j0), s.stride = of.step();
    if (of.codes.kind == kPlain) return s;
    s.group = of.codes.group, s.groups = of.codes.groups;
    s.scales = scales, s.zeros = scales + of.room;
    widen(of, of.codes.scales, q, g, j0, n, scales);
    if (of.codes.zeros.data) widen(of, of.codes.zeros, q, g, j0, n, scales + of.room);
    return s;
  }
  // One scale for each row of codes: the rows' weights are multiplied with it instead.
  void scale_weights(const Stored& of, const Step& s) const {
    if (of.codes.kind == kPlain || of.read.grouped) return;
    for (i64 i = 0; i < rows; ++i)
      for (i64 r = 0; r < s.n; r += W) {
        float* at = s.weights + i * kGlance + r;
        store(at, load(at) * load(s.scales + r));
      }
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

  // Row `i` of the queries as the keys are read.
  void lay_query(const Sequence& q, i64 g, i64 i, float* out) const {
    with_type(c.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* from = row_at<T>(c.q, q, head_of(g, i), place_of(i));
      for (i64 at = 0; at < k.padded; at += k.read.block) {
        float all[kMostBlock] = {};
        for (i64 d = at; d < least(c.d, at + k.read.block); d += W)
          store(all + d - at, c.d - d >= W ? load(from + d) : load(from + d, int(c.d - d)));
        for (int i = 0; i < k.read.block; ++i) out[at + k.read.query_place(i)] = all[i];
      }
    });
    if (k.read.prepare) k.read.prepare(out, k.padded);
  }

  // found: bases [rows], sums [rows], outputs [rows][width].
  void run_stretch(i64 b, i64 g, i64 stretch, float* slot, float* found) const {
    const Sequence q(c, b);
    float *queries = slot, *weights = slot + rows * k.padded;
    float *k_scales = weights + rows * kGlance, *v_scales = k_scales + 2 * k.room;
    float *bases = found, *sums = found + rows, *out = found + 2 * rows;
    for (i64 i = 0; i < k.room; ++i) k_scales[k.room + i] = 8.0f;
    for (i64 i = 0; i < v.room; ++i) v_scales[v.room + i] = 8.0f;
    for (i64 i = 0; i < rows; ++i) {
      bases[i] = -kInf;
      sums[i] = 0.0f;
      lay_query(q, g, i, queries + i * k.padded);
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
      Step keys = step_of(k, q, g, j0, n, k_scales), values = step_of(v, q, g, j0, n, v_scales);
      keys.weights = values.weights = weights;
      keys.numbers = queries, values.numbers = out;
      keys.next = values.from, keys.next_stride = values.stride, keys.next_bytes = v.bytes(c.dv);
      values.next = j0 + 2 * n <= end ? bytes_at(k, q, g, j0 + n) : nullptr;
      values.next_stride = keys.stride, values.next_bytes = k.bytes(c.d);
      k.read.score(keys);
      scale_weights(k, keys);
      const double factor = raw ? c.scale * 1.4426950408889634 : 1.4426950408889634;
      for (i64 i = 0; i < rows; ++i) {
        float* s = weights + i * kGlance;
        if (raw)
          for (i64 r = n; r < ceil_div(n, W) * W; ++r) s[r] = -kInf;
        else
          shape_row(q, g, i, j0, n, s);
        fold_row(s, n, float(factor), bases[i], sums[i], out + i * width);
      }
      scale_weights(v, values);
      v.read.mix(values);
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
    const auto numbers = [&](i64 d) INLINE_LAMBDA {
      Vec out = zero();
      for (i64 s = 0; s < stretches; ++s) {
        const float from = found[s * room + row];
        if (from == -kInf) continue;
        const float* part = found + s * room + 2 * rows + row * width;
        out = fma(load(part + d), set1(__builtin_exp2f(from - base)), out);
      }
      return out * set1(whole);
    };
    with_type(c.dtype, [&](auto* type) {
      auto* to = row_at<std::remove_pointer_t<decltype(type)>>(c.out, q, h, i);
      for (i64 at = 0; at < width; at += v.read.block) {
        float lanes[kMostBlock], all[kMostBlock];
        for (i64 d = 0; d < v.read.block; d += W) store(lanes + d, numbers(at + d));
        for (int i = 0; i < v.read.block; ++i) all[i] = lanes[v.read.sum_place(i)];
        for (i64 d = at; d < least(c.dv, at + v.read.block); d += W)
          if (c.dv - d >= W)
            store(to + d, load(all + d - at));
          else
            store(to + d, load(all + d - at), int(c.dv - d));
      }
    });
    if (c.lse.data)
      *row_at<float>(c.lse, q, h, i) =
          sum == 0.0 ? -kInf : float((double(base) + __builtin_log2(sum)) * 0.6931471805599453);
  }

  void run() const {
    const i64 pairs = c.b * c.g, items = pairs * stretches;
    const i64 slot = ceil_div(slot_room(), 16) * 16;
    const i64 bytes = items * least(kStretch, most(1, c.s)) * (k.bytes(c.d) + v.bytes(c.dv));
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

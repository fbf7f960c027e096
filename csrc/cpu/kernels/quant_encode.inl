// Values to codes: by groups, by blocks, and by scales that several pieces share.

// x / scale, as division rounds it: the product with the inverse, corrected by what it leaves
// (Markstein 1990), or the division itself.
template <bool Plain, bool Power>
INLINE Vec ratio(Vec x, Vec scale, Vec inverse) {
  if (Power) return x * inverse;
  return Plain ? exact_quotient(x, scale, inverse) : Vec{x.v / scale.v};
}

template <class C, bool Plain, bool Power, class T>
INLINE void encode_values(const T* x, uint8_t* codes, i64 n, const Scale& s) {
  const Vec scale = set1(s.value), inverse = set1(s.inverse), zero = set1(s.zero);
  each(n, [&](auto lanes, i64 i) INLINE_LAMBDA {
    const Vec v = get(x + i, lanes);
    const Vec q = ratio<Plain, Power>(v, scale, inverse);
    store_bytes(codes + i, (Lane32)C::template code<Plain>(q, v, zero));
  });
}

// n codes, one a byte; up to W - 1 bytes behind them are written, too.
template <class C, class T>
APART void encode_apart(const T* x, uint8_t* codes, i64 n, const Scale& s) {
  encode_values<C, false, false>(x, codes, n, s);
}
template <class C, class T>
INLINE void encode(const T* x, uint8_t* codes, i64 n, const Scale& s, bool power) {
  if (s.inverse == 0.0f)
    __builtin_memset(codes, kHasZero<C> ? int(s.zero) : C::kZero, n);
  else if (std::is_same_v<C, E4m3> && power)
    encode_values<C, true, true>(x, codes, n, s);
  else if (s.plain)
    encode_values<C, true, false>(x, codes, n, s);
  else
    encode_apart<C>(x, codes, n, s);
}

// Groups of `size` next to each other, each a whole number of pairs of vectors.
template <class C, bool Power, class T>
INLINE void encode_chunk(const T* x, uint8_t* codes, i64 groups, i64 size, const Chunk& c) {
  for (i64 g = 0; g < groups; ++g) {
    const Vec scale = set1(c.value[g]), inverse = set1(c.inverse[g]), zero = set1(c.zero[g]);
    for (const T* end = x + size; x < end; x += 2 * W, codes += 2 * W) {
      const Vec a = get(x, All{}), b = get(x + W, All{});
      const Vec p = ratio<true, Power>(a, scale, inverse), q = ratio<true, Power>(b, scale, inverse);
      store_bytes(codes, (Lane32)C::template code<true>(p, a, zero));
      store_bytes(codes + W, (Lane32)C::template code<true>(q, b, zero));
    }
  }
}

// Collects the codes of a stretch of a row and writes them out.
template <class C>
struct Writer {
  uint8_t* out;
  i64 fill = 0;
  uint8_t room[kRoom + 64];

  INLINE_MEMBER Writer(const Quantize& a, i64 row, i64 from)
      : out(static_cast<uint8_t*>(a.codes) + row * row_bytes<C>(a.shape.cols) +
            row_bytes<C>(from)) {}
  INLINE_MEMBER void flush() {
    if (C::kPacked) {
      pack_nibbles(room, out, fill / 2);
      out += fill / 2;
    } else {
      __builtin_memcpy(out, room, fill);
      out += fill;
    }
    fill = 0;
  }
  template <class T>
  INLINE_MEMBER void add(const T* x, i64 n, const Scale& s, bool power) {
    while (n > 0) {
      const i64 take = least(n, kRoom - fill);
      encode<C>(x, room + fill, take, s, power);
      fill += take;
      if (fill == kRoom) flush();
      x += take;
      n -= take;
    }
  }
  // Groups of `size`, at most kRoom values in all, that fill vectors and have plain scales.
  template <class T>
  INLINE_MEMBER void add_chunk(const T* x, i64 groups, i64 size, const Chunk& c, bool power) {
    flush();
    uint8_t* to = C::kPacked ? room : out;
    if (std::is_same_v<C, E4m3> && power)
      encode_chunk<C, true>(x, to, groups, size, c);
    else
      encode_chunk<C, false>(x, to, groups, size, c);
    if (C::kPacked)
      fill = groups * size;
    else
      out += groups * size;
  }
  // An odd row ends in a byte whose upper half holds the code of 0.
  INLINE_MEMBER void close(const Scale& last) {
    if (C::kPacked && fill % 2) room[fill++] = kHasZero<C> ? uint8_t(last.zero) : C::kZero;
    flush();
  }
};

// Columns [from, from + n) of a row, whose groups of `size` start at scale number `at`. Out takes
// the values and their scales: a Writer.
template <class Out, class C, class T>
APART void quantize_groups(const Quantize& a, i64 row, i64 from, i64 n, i64 size, i64 at) {
  const T* x = static_cast<const T*>(a.input) + row * a.shape.cols + from;
  Out writer(a, row, from);
  const bool power = a.kind == kMxfp8;
  const i64 together = most(1, least(kTogether, 4096 / size));
  Chunk c;
  Scale s{};
  for (i64 i = 0; i < n; i += together * size, at += together) {
    const i64 groups = least(together, ceil_div(n - i, size));
    for (i64 g = 0; g < groups; ++g) {
      const Extent e = extent<C>(x + i + g * size, least(size, n - i - g * size));
      c.high[g] = e.high, c.low[g] = e.low;
    }
    const bool plain = make_scales<C>(a, c, groups, at);
    const i64 values = groups * size;
    if (plain && i + values <= n && values <= kRoom && fills_vectors(size)) {
      writer.add_chunk(x + i, groups, size, c, power);
      continue;
    }
    for (i64 g = 0; g < groups; ++g) {
      s = plain ? Scale{c.value[g], c.inverse[g], c.zero[g], true}
                : make_scale<C>(a, {c.high[g], c.low[g]}, at + g);
      writer.add(x + i + g * size, least(size, n - i - g * size), s, power);
    }
  }
  writer.close(s);
}

// Blocks of b x b next to each other: rows [row, row + height), columns [from, from + n), scales
// from number `at` on.
template <class Out, class C, class T>
APART void quantize_blocks(const Quantize& a, i64 row, i64 height, i64 from, i64 n, i64 at) {
  const i64 cols = a.shape.cols, b = -a.shape.group;
  const T* x = static_cast<const T*>(a.input) + row * cols + from;
  Extent found[kTogether];
  Scale scales[kTogether];
  for (i64 i = 0; i < height; ++i)
    for (i64 j = 0; j * b < n; ++j)
      found[j].merge(extent<C>(x + i * cols + j * b, least(b, n - j * b)));
  for (i64 j = 0; j * b < n; ++j) scales[j] = make_scale<C>(a, found[j], at + j);
  for (i64 i = 0; i < height; ++i) {
    Out writer(a, row + i, from);
    i64 j = 0;
    for (; j * b < n; ++j)
      writer.add(x + i * cols + j * b, least(b, n - j * b), scales[j], false);
    writer.close(scales[j - 1]);
  }
}

// Scales of rows, or of everything, that several pieces share: first all extents, then all codes.
template <class Out, class C, class T>
INLINE void quantize_shared(const Quantize& a, i64 bytes) {
  const Shape& s = a.shape;
  const i64 across = ceil_div(s.cols, kPiece), units = s.group == 0 ? s.rows : 1;
  const i64 share = s.rows * across / units;  // pieces of each unit, one after the other
  const Scratch room(s.rows * across * 2 + units * 4);
  Extent* found = reinterpret_cast<Extent*>(room.data());
  Scale* scales = reinterpret_cast<Scale*>(found + s.rows * across);
  const T* x = static_cast<const T*>(a.input);
  deal(s.rows, s.cols, kPiece, bytes, a.threads, [&](i64 row, i64 from, i64 n) {
    found[row * across + from / kPiece] = extent<C>(x + row * s.cols + from, n);
  });
  for (i64 u = 0; u < units; ++u) {
    Extent e;
    for (i64 i = 0; i < share; ++i) e.merge(found[u * share + i]);
    scales[u] = make_scale<C>(a, e, u);
  }
  deal(s.rows, s.cols, kPiece, bytes, a.threads, [&](i64 row, i64 from, i64 n) {
    Out writer(a, row, from);
    const Scale& scale = scales[s.group == 0 ? row : 0];
    writer.add(x + row * s.cols + from, n, scale, false);
    writer.close(scale);
  });
}

template <class Out, class C, class T>
INLINE void quantize_as(const Quantize& a) {
  const Shape& s = a.shape;
  const i64 bytes = s.rows * s.cols * i64(sizeof(T) + 1);
  if (s.group < -1) {
    // some 64K values at a time, which a second-level cache keeps between the passes
    const i64 b = -s.group, wide = b * most(1, least(kTogether, (1 << 16) / (b * b)));
    const i64 down = ceil_div(s.height, b), across = ceil_div(s.cols, wide);
    const i64 count = s.rows / s.height * down * across;
    parallel_for(count, useful_threads(bytes, a.threads), [&](i64 i) {
      const i64 top = i / across % down * b, from = i % across * wide;
      const i64 row = i / (across * down) * s.height + top;
      quantize_blocks<Out, C, T>(a, row, least(b, s.height - top), from, least(wide, s.cols - from),
                            i / across * ceil_div(s.cols, b) + from / b);
    });
    return;
  }
  const bool long_rows = s.cols > kPiece && s.rows < 4 * a.threads;
  if (s.group == -1 || (s.group == 0 && long_rows)) return quantize_shared<Out, C, T>(a, bytes);
  const i64 size = s.group == 0 ? s.cols : s.group, groups = ceil_div(s.cols, size);
  const i64 piece = s.group == 0 ? s.cols : piece_of(s);
  deal(s.rows, s.cols, piece, bytes, a.threads, [&](i64 row, i64 from, i64 n) {
    quantize_groups<Out, C, T>(a, row, from, n, size, row * groups + from / size);
  });
}

void quantize(const Quantize& a) {
  if (a.shape.rows == 0 || a.shape.cols == 0) return;
  with_type(a.dtype, [&](auto* type) {
    with_kind(a.kind, a.zeros != nullptr, [&](auto code) {
      using C = decltype(code);
      quantize_as<Writer<C>, C, std::remove_pointer_t<decltype(type)>>(a);
    });
  });
}

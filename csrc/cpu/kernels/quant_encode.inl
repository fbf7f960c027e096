// Values to codes: by groups, by blocks, and by scales that several pieces share.

// x / scale, as division rounds it: the product with the inverse, corrected by what it leaves
// (Markstein 1990), or the division itself.
template <bool Plain, bool Power>
INLINE Vec ratio(Vec x, Vec scale, Vec inverse) {
  if (Power) return x * inverse;
  return Plain ? exact_quotient(x, scale, inverse) : Vec{x.v / scale.v};
}

// Where a product with the inverse decides as the quotient does.
template <class C, class T>
constexpr bool kNearDoes =
    W == 16 && sizeof(T) == 2 && (std::is_same_v<C, Nf4> || std::is_same_v<C, Fp4>);

// Numbers and scales of 16 bits have no quotient below 16 within 2^-14 of half an integer but
// itself: to the next multiple of 2^-15 is as good as exact.
template <class C, class T>
constexpr bool kSnaps =
    sizeof(T) == 2 && (std::is_same_v<C, Int4> || std::is_same_v<C, Int4Zero>);
constexpr float kSnap = 384.0f;

// The codes of numbers of type T, whose scale is plain.
template <class C, class T, bool Power>
INLINE Words code_of(Vec x, Vec scale, Vec inverse, Vec zero) {
  if constexpr (kNearDoes<C, T>) return C::kNear.code(x * inverse);
  if (kSnaps<C, T>)
    return C::template code<true>(fma(x, inverse, set1(kSnap)) - set1(kSnap), x, zero);
  return C::template code<true>(ratio<true, Power>(x, scale, inverse), x, zero);
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

// Codes of groups of `size` next to each other, each a whole number of pairs of vectors; how many
// values were done: pairs of pairs. As many values behind them, whose turn is next, are on their
// way from memory meanwhile.
template <class C, bool Power, class T>
INLINE i64 encode_chunk(const T* x, uint8_t* codes, i64 groups, i64 size, const Chunk& c) {
  const i64 values = groups * size / (4 * W) * (4 * W);
  const uintptr_t ahead = uintptr_t(groups * size) * sizeof(T);
  i64 g = 0, left = size;
  for (i64 i = 0; i < values; i += 4 * W, x += 4 * W) {
    for (uintptr_t line = 0; line < 4 * W * sizeof(T); line += 64)
      __builtin_prefetch((const void*)(uintptr_t(x) + ahead + line));
    Words made[4];
#pragma GCC unroll 2
    for (int half = 0; half < 4; half += 2) {
      if (left == 0) ++g, left = size;
      left -= 2 * W;
      const Vec scale = set1(c.value[g]), inverse = set1(c.inverse[g]), zero = set1(c.zero[g]);
#pragma GCC unroll 2
      for (int k = half; k < half + 2; ++k) {
        const Vec v = get(x + k * W, All{});
        made[k] = code_of<C, T, Power>(v, scale, inverse, zero);
      }
    }
    const auto lane = [&](int k) INLINE_LAMBDA { return (Lane32)made[k]; };
    if (C::kPacked)
      store_nibbles(codes + i / 2, lane(0), lane(1), lane(2), lane(3));
    else
      store_bytes(codes + i, lane(0), lane(1), lane(2), lane(3));
  }
  return values;
}

// Pairs of bf16 numbers, whose codes share a byte: one is the upper half of a lane, the other the
// lower one.
template <class C>
INLINE i64 encode_pairs(const bf16* x, uint8_t* codes, i64 groups, i64 size, const Chunk& c) {
  const uintptr_t ahead = uintptr_t(groups * size) * sizeof(bf16);
  for (i64 g = 0; g < groups; ++g) {
    const Vec scale = set1(c.value[g]), inverse = set1(c.inverse[g]), zero = set1(c.zero[g]);
    for (const bf16* end = x + size; x < end; x += 2 * W, codes += W) {
      __builtin_prefetch((const void*)(uintptr_t(x) + ahead));
      const Words both = read_as<Words>(x);
      const Words first = code_of<C, bf16, false>(as_float(both << 16), scale, inverse, zero);
      const Words second =
          code_of<C, bf16, false>(as_float(both & 0xffff0000u), scale, inverse, zero);
      store_bytes(codes, (Lane32)(first | second << 4));
    }
  }
  return groups * size;
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
  // Groups of `size` that fill vectors and have plain scales.
  template <class T>
  INLINE_MEMBER void add_chunk(const T* x, i64 groups, i64 size, const Chunk& c, bool power) {
    flush();
    const bool exact = std::is_same_v<C, E4m3> && power;
    i64 done;
    if constexpr (C::kPacked && std::is_same_v<T, bf16>)
      done = encode_pairs<C>(x, out, groups, size, c);
    else
      done = exact ? encode_chunk<C, true>(x, out, groups, size, c)
                   : encode_chunk<C, false>(x, out, groups, size, c);
    out += C::kPacked ? done / 2 : done;
    const i64 last = groups - 1, rest = groups * size - done;
    if (rest) add(x + done, rest, {c.value[last], c.inverse[last], c.zero[last], true}, power);
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
    const bool whole = fills_vectors(size) && i + groups * size <= n;
    if (whole && groups > 1) {
      extents<C>(x + i, groups, size, c);
    } else {
      for (i64 g = 0; g < groups; ++g) {
        const Extent e = extent<C>(x + i + g * size, least(size, n - i - g * size));
        c.high[g] = e.high, c.low[g] = e.low;
      }
    }
    const bool plain = make_scales<C>(a, c, groups, at);
    if (plain && whole) {
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
  Peak<C, T> peaks[kTogether];
  Extent found[kTogether];
  Scale scales[kTogether];
  Chunk c;
  bool whole = fills_vectors(b) && n % b == 0;
  for (i64 i = 0; i < height; ++i) {
    const uintptr_t below = uintptr_t(x + (i + 4) * cols);  // each row lies on a page of its own
    for (uintptr_t line = 0; line < uintptr_t(n) * sizeof(T); line += 64)
      __builtin_prefetch((const void*)(below + line));
    for (i64 j = 0; j * b < n; ++j) {
      if (whole)
        peaks[j].take_all(x + i * cols + j * b, b);
      else
        found[j].merge(extent<C>(x + i * cols + j * b, least(b, n - j * b)));
    }
  }
  for (i64 j = 0; j * b < n; ++j) {
    found[j].merge(peaks[j].close());
    const Scale s = scales[j] = make_scale<C>(a, found[j], at + j);
    c.value[j] = s.value, c.inverse[j] = s.inverse, c.zero[j] = s.zero;
    whole = whole && s.plain;
  }
  for (i64 i = 0; i < height; ++i) {
    Out writer(a, row + i, from);
    if (whole) writer.add_chunk(x + i * cols, n / b, b, c, false);
    i64 j = whole ? n / b : 0;
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

// quantize and dequantize: one read, one write, but for scales that more than a cache holds share.
#include "cpu/kernels/elementwise.inl"
#include "cpu/kernels/quant_codes.inl"

// Codes wait here, one a byte, until they are written.
constexpr i64 kRoom = 2048;
// Values of one piece of work.
constexpr i64 kPiece = 8192;

template <class F>
INLINE void with_kind(int kind, bool zero, const F& f) {
  switch (kind) {
    case kInt8: return f(Int8{});
    case kInt4: return zero ? f(Int4Zero{}) : f(Int4{});
    case kNf4: return f(Nf4{});
    case kFp4: return f(Fp4{});
    case kE5m2: return f(E5m2{});
    default: return f(E4m3{});
  }
}

template <class C>
INLINE i64 row_bytes(i64 cols) {
  return C::kPacked ? (cols + 1) / 2 : cols;
}

// ---- the extent of a group

// Bits, as a float, of the largest magnitude; where kTwoSided, of the largest number and of the
// largest negated one, 0 at least. NaN has more bits than any number.
struct Extent {
  uint32_t high = 0, low = 0;
  INLINE_MEMBER void merge(const Extent& o) {
    high = high > o.high ? high : o.high;
    low = low > o.low ? low : o.low;
  }
};

template <class C>
constexpr bool kHasZero = std::is_same_v<C, Int4Zero>;
template <class C>
constexpr bool kTwoSided = kHasZero<C> || std::is_same_v<C, Int4>;

// Bits of a number that is not negative, from those of a type of its own.
INLINE uint32_t float_bits(const float*, uint32_t bits) { return bits; }
INLINE uint32_t float_bits(const bf16*, uint32_t bits) { return bits << 16; }
INLINE uint32_t float_bits(const f16*, uint32_t bits) {
  if (bits < 0x400) return bits_of(float(int(bits)) * 0x1p-24f);
  return (bits << 13) + (bits < 0x7c00 ? 0x38000000u : 0x70000000u);
}

// Numbers of either sign compare as the integers of their bits do: no conversion is needed.
template <class C, class T>
INLINE Extent extent(const T* x, i64 n) {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
  typedef Int Lanes __attribute__((vector_size(W * 4)));
  constexpr i64 kLanes = W * 4 / i64(sizeof(T));
  constexpr Int kSign = Int(sizeof(T) == 4 ? 0x80000000u : 0x8000u);
  Lanes high[2] = {}, low[2] = {};
  const auto take = [&](Lanes v, int k) INLINE_LAMBDA {
    const Lanes first = kTwoSided<C> ? v : v & Int(~kSign), second = v ^ kSign;
    high[k] = first > high[k] ? first : high[k];
    if (kTwoSided<C>) low[k] = second > low[k] ? second : low[k];
  };
  i64 i = 0;
  Lanes v;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    __builtin_memcpy(&v, x + i, sizeof(v));
    take(v, 0);
    __builtin_memcpy(&v, x + i + kLanes, sizeof(v));
    take(v, 1);
  }
  if (i + kLanes <= n) {
    __builtin_memcpy(&v, x + i, sizeof(v));
    take(v, 0);
    i += kLanes;
  }
  if (i < n) {
    Int rest[kLanes] = {};
    __builtin_memcpy(rest, x + i, (n - i) * i64(sizeof(T)));
    __builtin_memcpy(&v, rest, sizeof(v));
    take(v, 1);
  }
  const auto all = [](const Lanes(&a)[2]) INLINE_LAMBDA {
    Words both = (Words)(a[0] > a[1] ? a[0] : a[1]);
    if (sizeof(T) == 2) both = larger(both & 0xffffu, both >> 16);
    return float_bits(static_cast<const T*>(nullptr), top_bits(as_float(both)));
  };
  Extent out;
  out.high = all(high);
  if (kTwoSided<C>) out.low = all(low);
  return out;
}

// ---- the scale of a group

struct Scale {
  float value, inverse, zero;  // inverse 0: no code but that of 0
  bool plain;                  // far from where the corrected product below would fail
};

INLINE uint16_t bf16_bits(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40u);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
INLINE float from_bf16_bits(uint16_t bits) { return as_float(uint32_t(bits) << 16); }

INLINE Scale finish(float value, bool finite) {
  Scale s{value, 0.0f, 0.0f, false};
  const uint32_t size = bits_of(value) & 0x7fffffffu;
  if (finite && size) {
    s.inverse = 1.0f / value;
    s.plain = size > 27u << 23 && size < 227u << 23;
    if (!s.plain) s.inverse = 1.0f;  // not used, but no 0
  }
  return s;
}

// The scale of a group, written where it is stored. Each division is the one of plain torch.
template <class C>
INLINE Scale make_scale(const Quantize& a, const Extent& e, i64 at) {
  const uint32_t size = e.high > e.low ? e.high : e.low;
  const bool finite = size < 0x7f800000u;
  const float nan = __builtin_nanf("");
  if (a.kind == kMxfp8) {
    const uint32_t exponent = size >> 23, up = (size & 0x7fffffu) > 0x600000u;
    const uint8_t byte = !finite ? 255 : exponent + up < 8 ? 0 : uint8_t(exponent + up - 8);
    static_cast<uint8_t*>(a.scales)[at] = byte;
    Scale s{power_of(byte), 0.0f, 0.0f, false};
    if (finite && size) s.inverse = power_of(uint8_t(254 - byte));
    return s;
  }
  if (kTwoSided<C>) {
    float value = e.high >= e.low ? as_float(e.high) * -0.125f : as_float(e.low) * 0.125f;
    if (kHasZero<C>) value = as_float(e.high) / 15.0f + as_float(e.low) / 15.0f;
    const uint16_t stored = bf16_bits(finite ? value : nan);
    static_cast<uint16_t*>(a.scales)[at] = stored;
    Scale s = finish(from_bf16_bits(stored), finite);
    if (kHasZero<C>) {
      if (s.inverse != 0.0f) {
        const float zero = as_float(e.low) / s.value, most = zero < 15.0f ? zero : 15.0f;
        s.zero = (most + kRound) - kRound;
      }
      static_cast<uint16_t*>(a.zeros)[at] = bf16_bits(s.zero);
    }
    return s;
  }
  const float value = finite ? as_float(size) / C::kMost : nan;
  static_cast<float*>(a.scales)[at] = value;
  return finish(value, finite);
}

// Groups whose scales are made together; lanes behind the last one hold ones.
constexpr i64 kTogether = 64;
struct alignas(64) Chunk {
  uint32_t high[kTogether], low[kTogether];
  float value[kTogether], inverse[kTogether], zero[kTogether];
};
template <class V, class T>
INLINE V read_as(const T* p) {
  V out;
  __builtin_memcpy(&out, p, sizeof(out));
  return out;
}

// The scales of n groups, as make_scale has them; false, with nothing written, if one of them is
// not plain.
template <class C>
INLINE bool make_scales(const Quantize& a, Chunk& c, i64 n, i64 at) {
  const bool power = a.kind == kMxfp8;
  Words odd = words(0), byte = words(0);
  uint8_t bytes[kTogether];
  for (i64 i = n; i % W; ++i) c.high[i] = c.low[i] = 0x3f800000u;
  for (i64 i = 0; i < n; i += W) {
    const Words high = read_as<Words>(c.high + i), low = read_as<Words>(c.low + i);
    Vec value, inverse, none = zero();
    if (std::is_same_v<C, E4m3> && power) {
      const Words up = (Words)((high & 0x7fffffu) > 0x600000u) & 1u;
      byte = (high >> 23) + up - 8u;
      odd |= (Words)(byte - 1u >= 240u);
      store_bytes(bytes + i, (Lane32)byte);
      value = as_float(byte << 23), inverse = as_float((254u - byte) << 23);
    } else {
      if (kHasZero<C>)
        value = rounded((const bf16*)nullptr, as_float(high) / set1(15.0f) + as_float(low) / set1(15.0f));
      else if (kTwoSided<C>)
        value = rounded((const bf16*)nullptr,
                        as_float(pick((Words)(high >= low), high | 0x80000000u, low)) * set1(0.125f));
      else
        value = as_float(high) / set1(C::kMost);
      inverse = set1(1.0f) / value;
      odd |= (Words)((bits_of(value) & 0x7fffffffu) - (27u << 23) >= (200u << 23));
      if (kHasZero<C>) {
        const Vec ratio = at_most(as_float(low) / value, set1(15.0f));
        none = (ratio + set1(kRound)) - set1(kRound);
      }
    }
    store(c.value + i, value);
    store(c.inverse + i, inverse);
    store(c.zero + i, none);
  }
  if (top_bits(as_float(odd))) return false;
  if (std::is_same_v<C, E4m3> && power) {
    __builtin_memcpy(static_cast<uint8_t*>(a.scales) + at, bytes, n);
  } else if (kTwoSided<C>) {
    each(n, [&](auto lanes, i64 i) INLINE_LAMBDA {
      put<false>(static_cast<bf16*>(a.scales) + at + i, get(c.value + i, lanes), lanes);
      if (kHasZero<C>)
        put<false>(static_cast<bf16*>(a.zeros) + at + i, get(c.zero + i, lanes), lanes);
    });
  } else {
    __builtin_memcpy(static_cast<float*>(a.scales) + at, c.value, n * 4);
  }
  return true;
}

// ---- values to codes

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

// Collects the codes of a stretch of a row and writes them out.
template <class C>
struct Writer {
  uint8_t* out;
  i64 fill = 0;
  uint8_t room[kRoom + 64];

  INLINE_MEMBER explicit Writer(uint8_t* p) : out(p) {}
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
  // An odd row ends in a byte whose upper half holds the code of 0.
  INLINE_MEMBER void close(const Scale& last) {
    if (C::kPacked && fill % 2) room[fill++] = kHasZero<C> ? uint8_t(last.zero) : C::kZero;
    flush();
  }
};

// Columns [from, from + n) of a row, whose groups of `size` start at scale number `at`.
template <class C, class T>
APART void quantize_groups(const Quantize& a, i64 row, i64 from, i64 n, i64 size, i64 at) {
  const T* x = static_cast<const T*>(a.input) + row * a.shape.cols + from;
  Writer<C> writer(static_cast<uint8_t*>(a.codes) + row * row_bytes<C>(a.shape.cols) +
                   row_bytes<C>(from));
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
template <class C, class T>
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
    Writer<C> writer(static_cast<uint8_t*>(a.codes) + (row + i) * row_bytes<C>(cols) +
                     row_bytes<C>(from));
    i64 j = 0;
    for (; j * b < n; ++j)
      writer.add(x + i * cols + j * b, least(b, n - j * b), scales[j], false);
    writer.close(scales[j - 1]);
  }
}

// Columns a piece of work has: whole groups, and an even number.
INLINE i64 piece_of(const Shape& s) {
  if (s.group <= 0) return kPiece;
  return s.group >= kPiece ? s.group : kPiece / s.group * s.group;
}

// Calls work(row, from, n) for pieces of all rows, several to a task.
template <class F>
INLINE void deal(i64 rows, i64 cols, i64 piece, i64 bytes, int threads, const F& work) {
  if (rows == 0 || cols == 0) return;
  const i64 across = ceil_div(cols, piece), pieces = rows * across;
  threads = useful_threads(bytes, threads);
  const i64 step =
      threads == 1 ? pieces : most(most(1, kPiece / least(cols, piece)), ceil_div(pieces, 16 * threads));
  parallel_for(ceil_div(pieces, step), threads, [&](i64 task) {
    const i64 end = least(pieces, (task + 1) * step);
    for (i64 i = task * step; i < end; ++i) {
      const i64 from = i % across * piece;
      work(i / across, from, least(piece, cols - from));
    }
  });
}

// Scales of rows, or of everything, that several pieces share: first all extents, then all codes.
template <class C, class T>
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
    Writer<C> writer(static_cast<uint8_t*>(a.codes) + row * row_bytes<C>(s.cols) +
                     row_bytes<C>(from));
    const Scale& scale = scales[s.group == 0 ? row : 0];
    writer.add(x + row * s.cols + from, n, scale, false);
    writer.close(scale);
  });
}

template <class C, class T>
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
      quantize_blocks<C, T>(a, row, least(b, s.height - top), from, least(wide, s.cols - from),
                            i / across * ceil_div(s.cols, b) + from / b);
    });
    return;
  }
  const bool long_rows = s.cols > kPiece && s.rows < 4 * a.threads;
  if (s.group == -1 || (s.group == 0 && long_rows)) return quantize_shared<C, T>(a, bytes);
  const i64 size = s.group == 0 ? s.cols : s.group, groups = ceil_div(s.cols, size);
  const i64 piece = s.group == 0 ? s.cols : piece_of(s);
  deal(s.rows, s.cols, piece, bytes, a.threads, [&](i64 row, i64 from, i64 n) {
    quantize_groups<C, T>(a, row, from, n, size, row * groups + from / size);
  });
}

void quantize(const Quantize& a) {
  if (a.shape.rows == 0 || a.shape.cols == 0) return;
  with_type(a.dtype, [&](auto* type) {
    with_kind(a.kind, a.zeros != nullptr, [&](auto code) {
      quantize_as<decltype(code), std::remove_pointer_t<decltype(type)>>(a);
    });
  });
}

// ---- codes to values

INLINE float number_at(const void* p, int type, i64 i) {
  if (type == kE8m0) return power_of(static_cast<const uint8_t*>(p)[i]);
  if (type == kFloat32) return static_cast<const float*>(p)[i];
  float room[W];
  if (type == kBFloat16) return from_bf16_bits(static_cast<const uint16_t*>(p)[i]);
  store(room, load(static_cast<const f16*>(p) + i, 1));
  return room[0];
}

template <class T>
constexpr float kLargest = 3.4028234663852886e38f;
template <>
constexpr float kLargest<bf16> = 3.3895313892515355e38f;
template <>
constexpr float kLargest<f16> = 65504.0f;

template <bool Clamp, class C, class T>
INLINE Vec decoded(Words codes, Vec scale, Vec zero) {
  const Vec v = C::value(codes, zero) * scale;
  return Clamp ? within(v, -kLargest<T>, kLargest<T>) : v;
}

template <bool Clamp, class C, class T>
INLINE void decode_bytes(const uint8_t* codes, T* out, i64 n, float scale, float zero, bool past) {
  const Vec s = set1(scale), z = set1(zero);
  i64 i = 0;
  for (; i + W <= n; i += W)
    write(past, out + i, decoded<Clamp, C, T>((Words)load_bytes(codes + i), s, z), All{});
  if (i < n) {
    uint8_t rest[W] = {};
    for (i64 k = i; k < n; ++k) rest[k - i] = codes[k];
    put<false>(out + i, decoded<Clamp, C, T>((Words)load_bytes(rest), s, z), First{int(n - i)});
  }
}

// W bytes of two codes each as 2 W numbers in their order: number(codes) decodes one in each lane.
template <class T, class F>
INLINE void decode_pairs(const uint8_t* codes, T* out, i64 n, bool past, const F& number) {
  i64 i = 0;
  Vec first, second;
  for (; i + 2 * W <= n; i += 2 * W) {
    const Words both = (Words)load_bytes(codes + i / 2);
    zip(number(both), number(both >> 4), first, second);
    write(past, out + i, first, All{});
    write(past, out + i + W, second, All{});
  }
  if (i == n) return;
  uint8_t rest[W] = {};
  for (i64 k = 0; k < (n - i + 1) / 2; ++k) rest[k] = codes[i / 2 + k];
  const Words both = (Words)load_bytes(rest);
  zip(number(both), number(both >> 4), first, second);
  put<false>(out + i, first, First{int(least(n - i, W))});
  if (n - i > W) put<false>(out + i + W, second, First{int(n - i - W)});
}

#if !defined(__clang__)
// All 16 values of a group, of 16 bits, twice in a register of 32: a permutation decodes, and looks
// at no more than five bits of an index.
template <class T>
INLINE i64 decode_halves(Vec values, const uint8_t* codes, T* out, i64 n, bool past) {
  typedef uint16_t Halves __attribute__((vector_size(W * 4)));
  alignas(64) T room[2 * W];
  store(room, values);
  store(room + W, values);
  const Halves twice = read_as<Halves>(room);
  i64 i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const Words both = (Words)load_bytes(codes + i / 2);
    const Halves made = __builtin_shuffle(twice, (Halves)(both | both << 12));
    write(past, (float*)(out + i), Vec{(Floats)made}, All{});
  }
  return i;
}

// Where a register holds 16 values, a group's are made once.
template <class C, class T>
INLINE void decode_lookup(const uint8_t* codes, T* out, i64 n, float scale, float zero, bool past) {
  uint32_t numbers[W];
  for (int i = 0; i < W; ++i) numbers[i] = uint32_t(i);
  const Vec values = decoded<true, C, T>(read_as<Words>(numbers), set1(scale), set1(zero));
  if (sizeof(T) == 2) {
    const i64 done = decode_halves(values, codes, out, n, past);
    codes += done / 2, out += done, n -= done;
  }
  decode_pairs(codes, out, n, past, [&](Words c) INLINE_LAMBDA {
    return Vec{__builtin_shuffle(values.v, (Ints)c)};
  });
}
#endif

template <bool Clamp, class C, class T>
INLINE void decode_values(const uint8_t* codes, T* out, i64 n, float scale, float zero, bool past) {
  const Vec s = set1(scale), z = set1(zero);
  if (!C::kPacked) return decode_bytes<Clamp, C>(codes, out, n, scale, zero, past);
  decode_pairs(codes, out, n, past, [&](Words c) INLINE_LAMBDA {
    return decoded<Clamp, C, T>(c & 15u, s, z);
  });
}

template <class C, class T>
INLINE void decode(const uint8_t* codes, T* out, i64 n, float scale, float zero, bool past) {
#if !defined(__clang__)
  if constexpr (W == 16 && C::kPacked) return decode_lookup<C>(codes, out, n, scale, zero, past);
#endif
  if (C::kBounded && __builtin_fabsf(scale) <= kLargest<T> / (2 * C::kMost))
    decode_values<false, C>(codes, out, n, scale, zero, past);
  else
    decode_values<true, C>(codes, out, n, scale, zero, past);
}

// The number of the first scale of a row, and how many columns a scale is for.
INLINE i64 scales_of(const Shape& s, i64 row, i64& size) {
  size = s.group > 0 ? s.group : s.group < -1 ? -s.group : s.cols;
  if (s.group == -1) return 0;
  const i64 across = ceil_div(s.cols, size);
  if (s.group >= 0) return row * across;
  const i64 down = ceil_div(s.height, size);
  return (row / s.height * down + row % s.height / size) * across;
}

template <class C, class T>
APART void dequantize_piece(const Dequantize& a, i64 row, i64 from, i64 n, bool past) {
  i64 size;
  const i64 base = scales_of(a.shape, row, size);
  const uint8_t* codes = static_cast<const uint8_t*>(a.codes) + row * row_bytes<C>(a.shape.cols) +
                         row_bytes<C>(from);
  T* out = static_cast<T*>(a.output) + row * a.shape.cols + from;
  for (i64 i = 0; i < n;) {
    const i64 at = base + (from + i) / size, count = least(n - i, size - (from + i) % size);
    const float zero = kHasZero<C> ? number_at(a.zeros, a.scale_type, at) : 0.0f;
    decode<C>(codes, out + i, count, number_at(a.scales, a.scale_type, at), zero,
              past && lined_up(out + i));
    codes += row_bytes<C>(count);
    i += count;
  }
}

void dequantize(const Dequantize& a) {
  const Shape& s = a.shape;
  with_type(a.dtype, [&](auto* type) {
    with_kind(a.kind, a.zeros != nullptr, [&](auto code) {
      using T = std::remove_pointer_t<decltype(type)>;
      using C = decltype(code);
      const i64 size = s.rows * s.cols * i64(sizeof(T)), bytes = size + s.rows * s.cols;
      const bool past = size >= kPastCaches;
      deal(s.rows, s.cols, piece_of(s), bytes, a.threads, [&](i64 row, i64 from, i64 n) {
        dequantize_piece<C, T>(a, row, from, n, past);
        if (past) stream_fence();
      });
    });
  });
}

constexpr Kernels table = {quantize, dequantize};

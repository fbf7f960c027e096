// Codes to values.

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

template <class C>
constexpr bool kInfinite = std::is_same_v<C, E5m2>;
template <class C>
constexpr bool kFp8 = std::is_same_v<C, E5m2> || std::is_same_v<C, E4m3>;

template <bool Clamp, class C, class T>
INLINE Vec decoded(Words codes, Vec scale, Vec zero) {
  const Vec v = C::value(codes, zero) * scale;
  return Clamp || kInfinite<C> ? within(v, -kLargest<T>, kLargest<T>) : v;
}

#if !defined(__clang__)
// 2 W numbers as bf16, half to even; NaN must have no more than its first bit.
template <int... I>
INLINE Vec two_as_bf16(Vec a, Vec b, std::integer_sequence<int, I...>) {
  const Words first = bits_of(a), second = bits_of(b);
  const Halves low = (Halves)(first + 0x7fffu + (first >> 16 & 1u));
  const Halves high = (Halves)(second + 0x7fffu + (second >> 16 & 1u));
  return {(Floats)__builtin_shuffle(low, high, Halves{uint16_t(2 * I + 1)...})};
}
INLINE Vec two_as_bf16(Vec a, Vec b) {
  return two_as_bf16(a, b, std::make_integer_sequence<int, 2 * W>{});
}
#endif

// 2 W numbers, none of them NaN with more than its first bits.
template <class T>
INLINE void write_two(bool past, T* out, Vec a, Vec b) {
#if !defined(__clang__)
  if constexpr (W == 16 && std::is_same_v<T, bf16>)
    return write(past, (float*)out, two_as_bf16(a, b), All{});
#endif
  write(past, out, a, All{});
  write(past, out + W, b, All{});
}

template <bool Clamp, class C, class T>
INLINE void decode_bytes(const uint8_t* codes, T* out, i64 n, float scale, float zero, bool past) {
  const Vec s = set1(scale), z = set1(zero);
  i64 i = 0;
  if constexpr (W == 16 && !Clamp && kFp8<C>) {
    const Vec unit = set1(scale * C::kHalfUnit);
    for (; i + 2 * W <= n; i += 2 * W) {
      Vec a, b;
      C::two_values(codes + i, a, b);
      a = a * unit, b = b * unit;
      if (kInfinite<C>) {
        a = within(a, -kLargest<T>, kLargest<T>);
        b = within(b, -kLargest<T>, kLargest<T>);
      }
      write_two(past, out + i, a, b);
    }
  }
  if constexpr (W == 16 && !Clamp)
    for (; i + 2 * W <= n; i += 2 * W)
      write_two(past, out + i, decoded<false, C, T>((Words)load_bytes(codes + i), s, z),
                decoded<false, C, T>((Words)load_bytes(codes + i + W), s, z));
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
// All 16 values of a group, of 16 bits, in both halves of a lane each: a permutation decodes, and
// looks at no more than five bits of an index, of which the lowest one does not matter.
template <class T>
INLINE i64 decode_halves(Vec values, const uint8_t* codes, T* out, i64 n, bool past) {
  T room[W];
  store(room, values);
  const Words raised = bits_of(load(reinterpret_cast<const bf16*>(room)));  // bits as they are
  const Halves twice = (Halves)(raised | raised >> 16);
  i64 i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const Words both = (Words)load_bytes(codes + i / 2);
    const Lane32 made = pick_halves((Lane32)twice, (Lane32)(both << 1 | both << 13));
    write(past, (float*)(out + i), Vec{(Floats)made}, All{});
  }
  return i;
}

// Two groups next to each other, of whole vectors each and with values far from the largest one:
// the first one's 16 are followed by the second one's.
template <class V>
INLINE Lane32 two_tables(V a, V b, const bf16*) {
  return (Lane32)two_as_bf16(a, b).v;
}
template <class V>
INLINE Lane32 two_tables(V a, V b, const f16*) {
  return (Lane32)two_as_f16(a, b);
}
template <class T>
INLINE void decode_twins(Vec a, Vec b, const uint8_t* codes, T* out, i64 size, bool past) {
  const Lane32 table = two_tables(a, b, out);
#pragma GCC unroll 2
  for (int second = 0; second < 2; ++second)
    for (const T* end = out + size; out < end; out += 2 * W, codes += W) {
      const Words both = (Words)load_bytes(codes);
      const Words index = ((both | both << 12) & 0xf000fu) | second * 0x100010u;
      write(past, (float*)out, Vec{(Floats)pick_halves(table, (Lane32)index)}, All{});
    }
}

INLINE Vec sixteen_numbers() {
  uint32_t numbers[W];
  for (int i = 0; i < W; ++i) numbers[i] = uint32_t(i);
  return Vec{(Floats)read_as<Words>(numbers)};
}

// Where a register holds 16 values, a group's are made once.
template <class C, class T>
INLINE void decode_lookup(const uint8_t* codes, T* out, i64 n, float scale, float zero, bool past) {
  const Vec values =
      decoded<true, C, T>(bits_of(sixteen_numbers()), set1(scale), set1(zero));
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
  i64 at = base + from / size, i = 0;
#if !defined(__clang__)
  if constexpr (W == 16 && C::kPacked && sizeof(T) == 2)
    if (from % size == 0 && size % (2 * W) == 0)
      for (; i + 2 * size <= n; i += 2 * size, codes += size, at += 2) {
        Vec values[2];
        bool held = true;
        for (int k = 0; k < 2; ++k) {
          const float scale = number_at(a.scales, a.scale_type, at + k);
          const float zero = kHasZero<C> ? number_at(a.zeros, a.scale_type, at + k) : 0.0f;
          const float farthest = 2 * C::kMost + __builtin_fabsf(zero);
          held = held && __builtin_fabsf(scale) * farthest <= kLargest<T>;
          values[k] = C::value(bits_of(sixteen_numbers()), set1(zero)) * set1(scale);
        }
        if (!held) break;
        decode_twins(values[0], values[1], codes, out + i, size, past && lined_up(out + i));
      }
#endif
  i64 count = least(n - i, size - from % size);
  for (; i < n; ++at, count = least(n - i, size)) {
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

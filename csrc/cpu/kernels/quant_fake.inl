// Values rounded to what a format holds, with no codes in memory: quantize and dequantize at once.

template <class C, bool Plain, bool Power, class T>
INLINE void fake_values(const T* x, T* out, i64 n, const Scale& s, bool past) {
  const Vec scale = set1(s.value), inverse = set1(s.inverse), zero = set1(s.zero);
  each(n, [&](auto lanes, i64 i) INLINE_LAMBDA {
    const Vec v = get(x + i, lanes);
    const Words code = C::template code<Plain>(ratio<Plain, Power>(v, scale, inverse), v, zero);
    write(past, out + i, decoded<true, C, T>(code, scale, zero), lanes);
  });
}
// With a scale that is not the group's own. What is no number stays none.
template <class C, class T>
APART void fake_apart(const T* x, T* out, i64 n, const Scale& s, bool past) {
  const Vec scale = set1(s.value), zero = set1(s.zero);
  each(n, [&](auto lanes, i64 i) INLINE_LAMBDA {
    const Vec v = get(x + i, lanes);
    const Words code = C::template code<false>(v / scale, v, zero);
    const Vec made = decoded<true, C, T>(code, scale, zero);
    const Words odd = (Words)((bits_of(v) & 0x7fffffffu) >= 0x7f800000u);
    write(past, out + i, as_float(bits_of(made) | (odd & 0x7fc00000u)), lanes);
  });
}
// The code of 0 for all.
template <class C, class T>
APART void fake_constant(const T* x, T* out, i64 n, const Scale& s, bool own) {
  const Vec zero = set1(s.zero);
  const Words code = kHasZero<C> ? bits_of(zero + set1(kRound)) & 15u : words(C::kZero);
  const Vec made = decoded<true, C, T>(code, set1(s.value), zero);
  each(n, [&](auto lanes, i64 i) INLINE_LAMBDA {
    const Words size = bits_of(get(x + i, lanes)) & 0x7fffffffu;
    const Words odd = own ? words(0) : (Words)(size >= 0x7f800000u);
    put<false>(out + i, as_float(bits_of(made) | (odd & 0x7fc00000u)), lanes);
  });
}

// Takes the place of a Writer of codes.
template <class C, class T>
struct Faker {
  T* out;
  const bool past;

  INLINE_MEMBER Faker(const Quantize& a, i64 row, i64 from)
      : out(static_cast<T*>(a.codes) + row * a.shape.cols + from),
        past(a.shape.rows * a.shape.cols * i64(sizeof(T)) >= kPastCaches) {}
  INLINE_MEMBER void add(const T* x, i64 n, const Scale& s, bool power) {
    const bool stream = past && lined_up(out);
    if (s.inverse == 0.0f)
      fake_constant<C>(x, out, n, s, true);
    else if (std::is_same_v<C, E4m3> && power)
      fake_values<C, true, true>(x, out, n, s, stream);
    else if (s.plain)
      fake_values<C, true, false>(x, out, n, s, stream);
    else
      fake_apart<C>(x, out, n, s, stream);
    out += n;
  }
  INLINE_MEMBER void add_chunk(const T* x, i64 groups, i64 size, const Chunk& c, bool power) {
    for (i64 g = 0; g < groups; ++g, x += size)
      add(x, size, Scale{c.value[g], c.inverse[g], c.zero[g], true}, power);
  }
  INLINE_MEMBER void close(const Scale&) {
    if (past) stream_fence();
  }
};

// The scale of a group, given by the caller, as numbers that are multiplied with it.
INLINE Scale given_scale(const void* scales, int type, i64 at) {
  const float value = number_at(scales, type, at);
  Scale s = finish(value, (bits_of(value) & 0x7fffffffu) < 0x7f800000u);
  s.plain = false;
  return s;
}

template <class C, class T>
APART void fake_given(const Fake& f, i64 row, i64 from, i64 n) {
  const Shape& shape = f.as.shape;
  i64 size;
  const i64 base = scales_of(shape, row, size), start = row * shape.cols + from;
  const T* x = static_cast<const T*>(f.as.input) + start;
  T* out = static_cast<T*>(f.as.codes) + start;
  const bool past = shape.rows * shape.cols * i64(sizeof(T)) >= kPastCaches;
  for (i64 i = 0; i < n;) {
    const i64 count = least(n - i, size - (from + i) % size);
    const Scale s = given_scale(f.as.scales, f.scale_type, base + (from + i) / size);
    if (s.inverse == 0.0f)
      fake_constant<C>(x + i, out + i, count, s, false);
    else
      fake_apart<C>(x + i, out + i, count, s, past && lined_up(out + i));
    i += count;
  }
  if (past) stream_fence();
}

void fake(const Fake& f) {
  const Shape& s = f.as.shape;
  if (s.rows == 0 || s.cols == 0) return;
  with_type(f.as.dtype, [&](auto* type) {
    with_kind(f.as.kind, f.as.zeros != nullptr, [&](auto code) {
      using T = std::remove_pointer_t<decltype(type)>;
      using C = decltype(code);
      if (f.scale_type < 0) return quantize_as<Faker<C, T>, C, T>(f.as);
      const i64 bytes = 2 * s.rows * s.cols * i64(sizeof(T));
      deal(s.rows, s.cols, piece_of(s), bytes, f.as.threads,
           [&](i64 row, i64 from, i64 n) { fake_given<C, T>(f, row, from, n); });
    });
  });
}

// ---- codes in given ranges

INLINE void spoil(void* scales, int type, i64 at) {  // several threads may, with the same value
  if (type == kFloat32)
    __atomic_store_n(static_cast<uint32_t*>(scales) + at, 0x7fc00000u, __ATOMIC_RELAXED);
  else
    __atomic_store_n(static_cast<uint16_t*>(scales) + at, uint16_t(0x7fc0), __ATOMIC_RELAXED);
}

template <class C, class T>
APART void encode_given(const Encode& a, i64 row, i64 from, i64 n) {
  i64 size;
  const i64 base = scales_of(a.as.shape, row, size);
  const T* x = static_cast<const T*>(a.as.input) + row * a.as.shape.cols + from;
  Writer<C> writer(a.as, row, from);
  Scale s{};
  for (i64 i = 0; i < n;) {
    const i64 count = least(n - i, size - (from + i) % size), at = base + (from + i) / size;
    s = given_scale(a.given, a.scale_type, at);
    if (extent<Int8>(x + i, count).high >= 0x7f800000u) spoil(a.as.scales, a.scale_type, at);
    writer.add(x + i, count, s, false);
    i += count;
  }
  writer.close(s);
}

void encode(const Encode& a) {
  const Shape& s = a.as.shape;
  with_type(a.as.dtype, [&](auto* type) {
    with_kind(a.as.kind, false, [&](auto code) {
      using T = std::remove_pointer_t<decltype(type)>;
      using C = decltype(code);
      const i64 bytes = s.rows * s.cols * i64(sizeof(T) + 1);
      deal(s.rows, s.cols, piece_of(s), bytes, a.as.threads,
           [&](i64 row, i64 from, i64 n) { encode_given<C, T>(a, row, from, n); });
    });
  });
}

// ---- gradients of given ranges (LSQ)

template <class C>
constexpr float kLow = std::is_same_v<C, Int4> ? -8.0f : -C::kMost;
template <class C>
constexpr float kHigh = std::is_same_v<C, Int4> ? 7.0f : C::kMost;

// A sum in twice the precision: gradients of many values cancel (Knuth's two-sum).
struct LongSum {
  Vec total, lost;
  INLINE_MEMBER void add(Vec v) {
    const Vec next = total + v, moved = next - total;
    lost = lost + ((total - (next - moved)) + (v - moved));
    total = next;
  }
  INLINE_MEMBER float value() const {
    float whole[W], rest[W];
    store(whole, total), store(rest, lost);
    double out = 0.0;
    for (int i = 0; i < W; ++i) out += double(whole[i]) + double(rest[i]);
    return float(out);
  }
};

// Writes the gradient of n values that share a scale, and returns their part of its own.
template <class C, class T>
APART float fake_grad_group(const T* x, const T* grad, T* out, i64 n, float scale, bool past) {
  if (scale == 0.0f) {
    __builtin_memcpy(out, grad, n * i64(sizeof(T)));
    return 0.0f;
  }
  const Vec s = set1(scale), minus = set1(-scale), low = set1(kLow<C>), high = set1(kHigh<C>);
  const Scale known = finish(scale, true);
  const Vec inverse = set1(known.plain ? known.inverse : 0.0f);
  LongSum sum{zero(), zero()};
  each(n, [&](auto lanes, i64 i) INLINE_LAMBDA {
    const Vec v = get(x + i, lanes), g = get(grad + i, lanes), q = v / s;
    const Words below = (Words)(q.v < low.v), above = (Words)(q.v > high.v), out_of = below | above;
    // number - v / s, with what the quotient's rounding left out
    const Vec number = C::value(C::template code<false>(q, v, zero()), zero());
    const Vec slope = (number - q) - fma_once(q, minus, v) * inverse;
    const Words bound = pick(below, bits_of(low), bits_of(high));
    sum.add(g * as_float(pick(out_of, bound, bits_of(slope))));
    write(past, out + i, as_float(bits_of(g) & ~out_of), lanes);
  });
  return sum.value();
}

void fake_grad(const FakeGrad& a) {
  const Shape& s = a.shape;
  with_type(a.dtype, [&](auto* type) {
    with_kind(a.kind, false, [&](auto code) {
      using T = std::remove_pointer_t<decltype(type)>;
      using C = decltype(code);
      const i64 bytes = 3 * s.rows * s.cols * i64(sizeof(T));
      const bool past = s.rows * s.cols * i64(sizeof(T)) >= kPastCaches;
      const i64 piece = s.group > 0 ? piece_of(s) : s.cols;
      deal(s.rows, s.cols, piece, bytes, a.threads, [&](i64 row, i64 from, i64 n) {
        i64 size;
        const i64 base = scales_of(s, row, size), across = ceil_div(s.cols, size);
        for (i64 i = from; i < from + n; i += size) {
          const i64 at = row * s.cols + i;
          T* out = static_cast<T*>(a.grad_input) + at;
          a.parts[row * across + i / size] = fake_grad_group<C, T>(
              static_cast<const T*>(a.input) + at, static_cast<const T*>(a.grad) + at, out,
              least(size, from + n - i), number_at(a.scales, a.scale_type, base + i / size),
              past && lined_up(out));
        }
        if (past) stream_fence();
      });
    });
  });
}

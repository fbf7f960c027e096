// Scales: what is largest in a group, and what its codes are then multiplied with.

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

// Groups whose scales are made together; lanes behind the last one hold ones.
constexpr i64 kTogether = 64;
struct alignas(64) Chunk {
  uint32_t high[kTogether], low[kTogether];
  float value[kTogether], inverse[kTogether], zero[kTogether];
};
// Groups of which as many fill whole vectors: their loops have no rest.
INLINE bool fills_vectors(i64 size) { return size % (2 * W) == 0; }

// Bits, as floats, of the numbers, not negative ones, that a lane holds: the larger of two of 16
// bits, or one of 32.
INLINE Words float_bits(const float*, Words bits) { return bits; }
INLINE Words float_bits(const bf16*, Words bits) {
  return larger(bits << 16, bits & 0xffff0000u);
}
INLINE Words float_bits(const f16*, Words both) {
  const Words bits = larger(both & 0xffffu, both >> 16);
  const Words normal = (bits << 13) + pick((Words)(bits < 0x7c00u), words(0x38000000u),
                                           words(0x70000000u));
  return pick((Words)(bits < 0x400u), bits_of(from_int(bits) * set1(0x1p-24f)), normal);
}

// What of a group is largest, lane by lane. Numbers of either sign compare as the integers of
// their bits do: no conversion is needed.
template <class C, class T>
struct Peak {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
  typedef Int Lanes __attribute__((vector_size(W * 4)));
  static constexpr i64 kLanes = W * 4 / i64(sizeof(T));
  static constexpr Int kSign = Int(sizeof(T) == 4 ? 0x80000000u : 0x8000u);
  Lanes high{}, low{};

  INLINE_MEMBER static Lanes larger_of(Lanes a, Lanes b) { return a > b ? a : b; }
  INLINE_MEMBER void take(Lanes v) {
    high = larger_of(kTwoSided<C> ? v : v & Int(~kSign), high);
    if (kTwoSided<C>) low = larger_of(v ^ kSign, low);
  }
  INLINE_MEMBER void merge(const Peak& o) {
    high = larger_of(o.high, high);
    if (kTwoSided<C>) low = larger_of(o.low, low);
  }
  // n numbers, a multiple of kLanes.
  INLINE_MEMBER void take_all(const T* x, i64 n) {
    for (const T* end = x + n; x < end; x += kLanes) take(read_as<Lanes>(x));
  }
  INLINE_MEMBER static uint32_t top(Lanes v) {
    return top_bits(as_float(float_bits(static_cast<const T*>(nullptr), (Words)v)));
  }
  INLINE_MEMBER Extent close() const {
    Extent out;
    out.high = top(high);
    if (kTwoSided<C>) out.low = top(low);
    return out;
  }
};

template <class C, class T>
INLINE Extent extent(const T* x, i64 n) {
  using P = Peak<C, T>;
  P a, b;
  i64 i = 0;
  for (; i + 2 * P::kLanes <= n; i += 2 * P::kLanes) {
    a.take(read_as<typename P::Lanes>(x + i));
    b.take(read_as<typename P::Lanes>(x + i + P::kLanes));
  }
  for (; i < n; i += P::kLanes) {
    T rest[P::kLanes] = {};
    __builtin_memcpy(rest, x + i, least(P::kLanes, n - i) * i64(sizeof(T)));
    a.take(read_as<typename P::Lanes>(rest));
  }
  a.merge(b);
  return a.close();
}

// W vectors to one: lane i is the largest of vector i's. Lanes with bit `Half` of their number go
// on with the second of two vectors, the others with the first one.
template <class P, int Half>
INLINE void reduce_lanes(Vec (&v)[W]) {
#pragma GCC unroll 8
  for (int i = 0; i < Half; ++i) {
    Vec here, there;
    halves<Half>(v[i], v[i + Half], here, there);
    using Lanes = typename P::Lanes;
    v[i] = Vec{(Floats)P::larger_of((Lanes)here.v, (Lanes)there.v)};
  }
  if constexpr (Half > 1) reduce_lanes<P, Half / 2>(v);
}

// Extents of groups next to each other, of whole vectors each.
template <class C, class T>
INLINE void extents(const T* x, i64 groups, i64 size, Chunk& c) {
  using P = Peak<C, T>;
  for (i64 g = 0; g < groups; g += W) {
    Vec high[W], low[W];
    const i64 count = least(W, groups - g);
    for (i64 i = 0; i < W; ++i) {
      P peak;
      if (i < count) peak.take_all(x + (g + i) * size, size);
      high[i] = Vec{(Floats)peak.high};
      low[i] = Vec{(Floats)peak.low};
    }
    const auto* type = static_cast<const T*>(nullptr);
    reduce_lanes<P, W / 2>(high);
    store((float*)(c.high + g), as_float(float_bits(type, bits_of(high[0]))));
    if (kTwoSided<C>) reduce_lanes<P, W / 2>(low);
    const Words least_bits = kTwoSided<C> ? float_bits(type, bits_of(low[0])) : words(0);
    store((float*)(c.low + g), as_float(least_bits));
  }
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

// a / Divisor, as division rounds it where nothing underflows.
template <int Divisor>
INLINE Vec quotient(Vec a) {
  if (Divisor == 1) return a;
  return exact_quotient(a, set1(float(Divisor)), set1(1.0f / Divisor));
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
        value = rounded((const bf16*)nullptr,
                        quotient<15>(as_float(high)) + quotient<15>(as_float(low)));
      else if (kTwoSided<C>)
        value = rounded((const bf16*)nullptr,
                        set1(0.125f) *
                            as_float(pick((Words)(high >= low), high | 0x80000000u, low)));
      else
        value = quotient<int(C::kMost)>(as_float(high));
      inverse = set1(1.0f) / value;
      odd |= (Words)((bits_of(value) & 0x7fffffffu) - (27u << 23) >= (200u << 23));
      if (kHasZero<C>) {
        const Vec ratio = at_most(exact_quotient(as_float(low), value, inverse), set1(15.0f));
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

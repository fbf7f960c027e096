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
// Groups of which as many fill whole vectors: their loops have no rest.
INLINE bool fills_vectors(i64 size) { return size % (2 * W) == 0; }
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
        value = rounded((const bf16*)nullptr,
                        as_float(high) / set1(15.0f) + as_float(low) / set1(15.0f));
      else if (kTwoSided<C>)
        value = rounded((const bf16*)nullptr,
                        set1(0.125f) *
                            as_float(pick((Words)(high >= low), high | 0x80000000u, low)));
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

// Codes to what a microkernel multiplies, kUnit of them at a time.

constexpr i64 kUnit = 64, kHalf = 32;  // a half lies in one group

INLINE float scale_at(const void* p, int type, i64 i) {
  if (type == kScaleFloat32) return ((const float*)p)[i];
  if (type == kScaleE8M0) {
    const uint32_t byte = ((const uint8_t*)p)[i];
    const uint32_t bits = byte == 0 ? 0x400000u : byte == 255 ? 0x7fc00000u : byte << 23;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
  if (type == kScaleBFloat16) {
    const uint32_t bits = uint32_t(((const uint16_t*)p)[i]) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
  float value[W];
  store(value, load((const f16*)p + i, 1));
  return value[0];
}

// Index of the scale of element (row, k).
INLINE i64 scale_index(const Weight& w, i64 row, i64 k) {
  return row / w.scale_block * w.scale_row + (w.group ? k / w.group : 0);
}
INLINE float zero_at(const Weight& w, i64 index) {
  return w.zeros ? scale_at(w.zeros, w.scale_type, index) : 8.0f;
}
INLINE bool two_a_byte(int kind) { return kind == kInt4 || kind == kNf4 || kind == kFp4; }
INLINE i64 code_bytes(int kind, i64 count) { return two_a_byte(kind) ? (count + 1) / 2 : count; }

INLINE IntVec bits_of(Vec a) { return (IntVec)a.v; }
INLINE Vec from_bits(IntVec a) { return {(decltype(Vec::v))a}; }
INLINE IntVec choose_bits(IntVec mask, IntVec yes, IntVec no) {
  return (mask & yes) | (~mask & no);
}

// ---- kinds: values(state, p, out) makes kHalf numbers, times the state's scale where Scaled

using HalfOf = Vec[kHalf / W];

struct Int8Codes {
  struct State {
    Vec scale;
  };
  INLINE_MEMBER static State state(const Weight&, float scale, float) { return {set1(scale)}; }
  template <bool Scaled>
  INLINE_MEMBER static void values(const State& s, const uint8_t* p, HalfOf& out) {
#pragma GCC unroll 8
    for (int i = 0; i < kHalf / W; ++i) {
      out[i] = to_float(bytes_as_words(p + i * W));
      if (Scaled) out[i] = out[i] * s.scale;
    }
  }
};

// fp8 with E bits of exponent: an 8-bit float is a small part of a large one, but for subnormals
// (integers times a power of two) and what is not finite.
template <int E>
struct Fp8Codes {
  using State = Int8Codes::State;
  INLINE_MEMBER static State state(const Weight&, float scale, float) { return {set1(scale)}; }
  INLINE_MEMBER static Vec number(IntVec code) {
    constexpr int kFraction = 7 - E, kBias = (1 << (E - 1)) - 1;
    const IntVec sign = (code & 0x80) << 24, rest = code & 0x7f;
    const IntVec normal = (rest << (23 - kFraction)) + ((127 - kBias) << 23);
    const float least = E == 4 ? 0x1p-9f : 0x1p-16f;
    const IntVec small = bits_of(to_float(rest) * set1(least));
    IntVec value = choose_bits(rest < (1 << kFraction), small, normal);
    if (E == 4)
      value = choose_bits(rest == 0x7f, IntVec{} + 0x7fc00000, value);
    else
      value = choose_bits(rest >= 0x7c, normal | 0x7f800000, value);
    return from_bits(value | sign);
  }
  template <bool Scaled>
  INLINE_MEMBER static void values(const State& s, const uint8_t* p, HalfOf& out) {
#pragma GCC unroll 8
    for (int i = 0; i < kHalf / W; ++i) {
      out[i] = number(lone_bytes(p + i * W));
      if (Scaled) out[i] = out[i] * s.scale;
    }
  }
};

constexpr float kIntegers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr float kNf4Values[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
constexpr float kFp4Values[16] = {
    0.0f, 0.0625f / 12, 8.0f / 12, 12.0f / 12, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12,
    -0.0f, -0.0625f / 12, -8.0f / 12, -12.0f / 12, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12};

// a0 b0 a1 b1 ...: the low half of what comes out, then the high one.
template <int... J>
INLINE void interleave(Vec& a, Vec& b, std::integer_sequence<int, J...>) {
  const auto x = a.v, y = b.v;
#if defined(__clang__) || __GNUC__ >= 12
  a.v = __builtin_shufflevector(x, y, (J / 2 + (J & 1) * W)...);
  b.v = __builtin_shufflevector(x, y, (W / 2 + J / 2 + (J & 1) * W)...);
#else
  a.v = __builtin_shuffle(x, y, IntVec{(J / 2 + (J & 1) * W)...});
  b.v = __builtin_shuffle(x, y, IntVec{(W / 2 + J / 2 + (J & 1) * W)...});
#endif
}

struct Nibbles {
  using State = Table;
  INLINE_MEMBER static State state(const Weight& w, float scale, float zero) {
    if (w.kind == kInt4) return scaled(shifted(load_table(kIntegers), zero), scale);
    return scaled(load_table(w.kind == kNf4 ? kNf4Values : kFp4Values), scale);
  }
  template <bool Scaled>
  INLINE_MEMBER static void values(const State& s, const uint8_t* p, HalfOf& out) {
#pragma GCC unroll 8
    for (int i = 0; i < kHalf / W; i += 2) {
      const IntVec bytes = lone_bytes(p + i / 2 * W);
      out[i] = lookup(s, bytes);
      out[i + 1] = lookup(s, bytes >> 4);
      interleave(out[i], out[i + 1], std::make_integer_sequence<int, W>{});
    }
  }
};

template <class F>
INLINE void with_kind(int kind, const F& call) {
  if (kind == kInt8) call(Int8Codes{});
  if (kind == kE4M3 || kind == kMxFp8) call(Fp8Codes<4>{});
  if (kind == kE5M2) call(Fp8Codes<5>{});
  if (two_a_byte(kind)) call(Nibbles{});
}

// Calls step(p, i, state) for halves [i, i + kHalf) of row `row` from k0 on, `count` elements in
// all; the codes behind the row's end are zeros of a copy.
template <class C, class F>
INLINE void each_half(const Weight& w, i64 row, i64 k0, i64 count, const F& step) {
  constexpr bool kPacked = std::is_same_v<C, Nibbles>;
  const uint8_t* p = w.codes + row * w.row + (kPacked ? k0 / 2 : k0);
  const i64 left = least(count, w.k - k0), group = w.group ? w.group : w.k;
  typename C::State state{};
  for (i64 i = 0, end = 0; i < left; i += kHalf) {
    if (i >= end) {
      const i64 at = scale_index(w, row, k0 + i);
      state = C::state(w, scale_at(w.scales, w.scale_type, at), zero_at(w, at));
      end = ((k0 + i) / group + 1) * group - k0;
    }
    if (left - i >= kHalf) {
      step(p + (kPacked ? i / 2 : i), i, state);
    } else {
      alignas(64) uint8_t rest[kHalf] = {};
      __builtin_memcpy(rest, p + (kPacked ? i / 2 : i), code_bytes(w.kind, left - i));
      step(rest, i, state);
    }
  }
}

#if defined(FASTLLM_DOTS)
// What is left of v when the `terms` largest bf16 that it is the sum of are taken away.
INLINE Vec rest_of(Vec v, int terms) {
  for (int t = 0; t < terms; ++t) v = v - rounded((const bf16*)nullptr, v);
  return v;
}

// Term t of the bf16 that n numbers are the sums of; they are cut off, so that none overflows.
template <class T>
APART void term_of(const T* x, i64 n, int t, bf16* out) {
  sweep(n, [&](auto lanes, i64 i, int) INLINE_LAMBDA {
    Vec v = get(x + i, lanes);
    for (int k = 0;; ++k) {
      const IntVec size = bits_of(v) & 0x7fffffff;
      const IntVec quiet = (size > 0x7f800000) & 0x400000;  // NaN must not lose its last bits
      const Vec top = from_bits((bits_of(v) & int32_t(0xffff0000)) | quiet);
      if (k == t) return put<false>(out + i, top, lanes);
      const IntVec finite = size < 0x7f800000;
      v = from_bits(bits_of(v - top) & finite);
    }
  });
}
#endif

// ---- rows as words: fp32, pairs of bf16 or int16, four int8

INLINE void put_half(float* out, const HalfOf& v) {
#pragma GCC unroll 8
  for (int i = 0; i < kHalf / W; ++i) store(out + i * W, v[i]);
}
#if defined(FASTLLM_DOTS)
INLINE void put_half(bf16* out, const HalfOf& v) {
  const __m512bh pairs = _mm512_cvtne2ps_pbh(v[1].v, v[0].v);
  _mm512_storeu_si512(out, (__m512i)pairs);
}
#endif

// `words` words of a row from k0 on, in blocks of 16 words that lie `step` words apart; zeros
// behind the row's end. Scales are in the numbers only where neighbours share them. term: of bf16.
template <class T, class C>
APART void decode_floats(const Weight& w, i64 row, i64 k0, i64 words, [[maybe_unused]] int term,
                         float* out, i64 step) {
  constexpr i64 kPer = 4 / sizeof(T);  // numbers a word
  const bool grouped = w.group != 0;
  each_half<C>(w, row, k0, words * kPer, [&](const uint8_t* p, i64 i, const auto& s) INLINE_LAMBDA {
    const i64 at = i / kPer;
    HalfOf v;
    if (grouped || std::is_same_v<C, Nibbles>)
      C::template values<true>(s, p, v);
    else
      C::template values<false>(s, p, v);
    if constexpr (kPer == 2) {
#if defined(FASTLLM_DOTS)
      if (__builtin_expect(term, 0)) {
#pragma GCC unroll 8
        for (int j = 0; j < kHalf / W; ++j) v[j] = rest_of(v[j], term);
      }
#endif
      put_half((T*)(out + at / 16 * step), v);
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < kHalf / W; ++j) {
        const i64 word = at + j * W;
        store(out + word / 16 * step + word % 16, v[j]);
      }
    }
  });
}

typedef int8_t Bytes __attribute__((vector_size(16)));

template <int... J>
INLINE Bytes zip_bytes(Bytes a, Bytes b, std::integer_sequence<int, J...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, J...);
#else
  return __builtin_shuffle(a, b, Bytes{J...});
#endif
}
using LowBytes = std::integer_sequence<int, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23>;
using HighBytes =
    std::integer_sequence<int, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>;

// kHalf nibbles less 8, in their order.
INLINE void nibbles_as_bytes(const uint8_t* p, int8_t* out) {
  Bytes v;
  __builtin_memcpy(&v, p, 16);
  const Bytes even = (v & 15) - 8, odd = ((v >> 4) & 15) - 8;
  const Bytes low = zip_bytes(even, odd, LowBytes{}), high = zip_bytes(even, odd, HighBytes{});
  __builtin_memcpy(out, &low, 16);
  __builtin_memcpy(out + 16, &high, 16);
}

// The same for integer codes: int8_t as they are (int4: less 8), or widened to int16_t.
template <class T, class C>
APART void decode_integers(const Weight& w, i64 row, i64 k0, i64 words, float* out, i64 step) {
  constexpr i64 kPer = 4 / sizeof(T);
  if (std::is_same_v<C, Int8Codes> && kPer == 4) {  // nothing to decode
    const uint8_t* p = w.codes + row * w.row + k0;
    i64 left = w.k - k0, i = 0;
    for (; i < words && left >= 64; i += 16, left -= 64)
      __builtin_memcpy(out + i / 16 * step, p + 4 * i, 64);
    if (i < words && left > 0) __builtin_memcpy(out + i / 16 * step, p + 4 * i, left);
    return;
  }
  each_half<C>(w, row, k0, words * kPer, [&](const uint8_t* p, i64 i, const auto&) INLINE_LAMBDA {
    alignas(64) int8_t bytes[kHalf];
    if (std::is_same_v<C, Nibbles>)
      nibbles_as_bytes(p, bytes);
    else
      __builtin_memcpy(bytes, p, kHalf);
    const i64 at = i / kPer;
    float* to = out + at / 16 * step + at % 16;
    if (kPer == 4)
      __builtin_memcpy(to, bytes, kHalf);
    else
      for (int j = 0; j < kHalf / 2; j += W) store_words(to + j, bytes_as_shorts(bytes + 2 * j));
  });
}

#if defined(FASTLLM_BYTE_DOTS)
// The sum of four bytes a word; words is a multiple of 8.
INLINE int32_t byte_sum(const float* row, i64 words) {
  IntVec sum{};
  const IntVec ones = IntVec{} + 0x01010101;
  for (i64 i = 0; i < words; i += W) {
    const Vec v = words - i >= W ? load(row + i) : load(row + i, int(words - i));
    sum = dot_bytes(ones, bits_of(v), sum);
  }
  return sum_words(sum);
}
#endif

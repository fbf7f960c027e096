// 8-bit codes of optimizer states, and the random numbers that round them without bias.

typedef uint32_t Words __attribute__((vector_size(W * 4)));
typedef int32_t Ints __attribute__((vector_size(W * 4)));
typedef uint8_t Bytes __attribute__((vector_size(W)));
typedef decltype(Vec::v) Floats;

INLINE Words words(uint32_t x) { return Words{} + x; }
INLINE Vec from_int(Words a) { return {(Floats)__builtin_convertvector((Ints)a, Floats)}; }
// Towards zero; a is in the range of int.
INLINE Words to_int(Vec a) { return (Words)__builtin_convertvector(a.v, Ints); }
INLINE Words pick_words(Words mask, Words yes, Words no) { return (mask & yes) | (~mask & no); }
INLINE Words less(Vec a, Vec b) { return (Words)(a.v < b.v); }
INLINE Words magnitude(Vec a) { return (Words)a.v & 0x7fffffffu; }
INLINE Vec quotient(Vec a, Vec b) { return {a.v / b.v}; }
INLINE Vec larger(Vec a, Vec b) { return {(Floats)pick_words(less(a, b), (Words)b.v, (Words)a.v)}; }

INLINE void store_bytes(void* p, Words a) {
  const Bytes b = __builtin_convertvector(a, Bytes);
  __builtin_memcpy(p, &b, W);
}

// A counter-based generator: 32 random bits an element from its index and the tensor's key, so
// that they do not depend on threads or on the width of a vector.
INLINE uint32_t mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x21f0aaadu;
  x ^= x >> 15;
  x *= 0x735a2d97u;
  return x ^ (x >> 15);
}
constexpr uint32_t kGolden = 0x9e3779b9u;
struct alignas(64) Lanes {
  uint32_t at[W];
};
constexpr Lanes lanes_times_golden() {
  Lanes out{};
  for (int i = 0; i < W; ++i) out.at[i] = uint32_t(i) * kGolden;
  return out;
}
constexpr Lanes kLaneSteps = lanes_times_golden();

struct Random {
  Words next;

  INLINE_MEMBER Random(uint32_t key, i64 at) {
    __builtin_memcpy(&next, &kLaneSteps, sizeof(next));
    next = next + (uint32_t(at) * kGolden + key + mixed(uint32_t(at >> 32)));
  }
  // Those of the next W elements.
  INLINE_MEMBER Words take() {
    Words x = next;
    next = next + uint32_t(W) * kGolden;
    x ^= x >> 16;
    x *= 0x21f0aaadu;
    x ^= x >> 15;
    x *= 0x735a2d97u;
    return x ^ (x >> 15);
  }
};
// 16 of the bits as a number in [0, 1).
template <bool Upper>
INLINE Vec fraction(Words random) {
  return from_int(Upper ? random >> 16 : random & 0xffffu) * set1(0x1p-16f);
}

// Each code: numbers in units of scale / kUnit; value(c) of codes counted from zero, rising; low(y)
// the code at or next below y. `put` and `get` add and take the sign.
struct SignedRoot {
  static constexpr uint32_t kMost = 127;
  static constexpr float kUnit = 16129.0f;
  static constexpr bool kSigned = true;
  INLINE_MEMBER static Vec value(Words c) {
    const Vec z = from_int(c);
    return z * z;
  }
  INLINE_MEMBER static Words low(Vec y) { return to_int(quick_root(y)); }
  INLINE_MEMBER static Words put(Words bits, Words code) {  // two's complement
    const Words s = (Words)((Ints)bits >> 31);
    return (code ^ s) - s;
  }
  INLINE_MEMBER static Vec get(Words byte) {
    const Vec z = from_int((Words)((Ints)(byte << 24) >> 24));
    return z * Vec{(Floats)magnitude(z)};
  }
};
struct FourthRoot {
  static constexpr uint32_t kMost = 255;
  static constexpr float kUnit = 4228250625.0f;
  static constexpr bool kSigned = false;
  INLINE_MEMBER static Vec value(Words c) {
    const Vec z = from_int(c), s = z * z;
    return s * s;
  }
  INLINE_MEMBER static Words low(Vec y) { return to_int(quick_root(quick_root(y))); }
  INLINE_MEMBER static Vec get(Words byte) { return value(byte); }
};
// e4m3: 4 exponent bits with bias 7, 3 bits of mantissa, 448 the largest.
INLINE Vec from_e4m3(Words c) {
  const Vec normal = {(Floats)((c << 20) + 0x3c000000u)};
  const Vec small = from_int(c) * set1(0x1p-9f);
  return {(Floats)pick_words((Words)(c < 8u), (Words)small.v, (Words)normal.v)};
}
INLINE Words floor_e4m3(Vec a) {
  const Words normal = ((Words)a.v >> 20) - (120u << 3);
  return pick_words(less(a, set1(0x1p-6f)), to_int(a * set1(0x1p9f)), normal);
}
struct Fp8 {
  static constexpr uint32_t kMost = 126;
  static constexpr float kUnit = 448.0f;
  static constexpr bool kSigned = true;
  INLINE_MEMBER static Vec value(Words c) { return from_e4m3(c); }
  INLINE_MEMBER static Words low(Vec y) { return floor_e4m3(y); }
  INLINE_MEMBER static Words put(Words bits, Words code) { return code | (bits >> 31 << 7); }
  INLINE_MEMBER static Vec get(Words byte) {
    return {(Floats)((Words)from_e4m3(byte & 0x7fu).v | (byte >> 7 << 31))};
  }
};
struct Fp8Square {
  static constexpr uint32_t kMost = 126;
  static constexpr float kUnit = 448.0f * 448.0f;
  static constexpr bool kSigned = false;
  INLINE_MEMBER static Vec value(Words c) {
    const Vec z = from_e4m3(c);
    return z * z;
  }
  INLINE_MEMBER static Words low(Vec y) { return floor_e4m3(quick_root(y)); }
  INLINE_MEMBER static Vec get(Words byte) { return value(byte); }
};

// kScaled or fewer codes into floats; what lies between n and the next whole vector is zero.
template <class C>
INLINE void decode_block(const uint8_t* codes, float scale, float* x, i64 n) {
  const Vec unit = set1(scale * (1.0f / C::kUnit));
  i64 i = 0;
  for (; i + W <= n; i += W) store(x + i, C::get((Words)load_bytes(codes + i)) * unit);
  if (i < n) {
    uint8_t rest[W] = {};
    for (i64 k = i; k < n; ++k) rest[k - i] = codes[k];
    store(x + i, C::get((Words)load_bytes(rest)) * unit);
  }
}

INLINE float largest_magnitude(const float* x, i64 n) {
  Words top = words(0);
  for (i64 i = 0; i < n; i += W) {
    const Words bits = magnitude(load(x + i));
    top = pick_words((Words)(bits > top), bits, top);
  }
  const uint32_t bits = top_bits({(Floats)top});
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return bits < 0x00800000u ? 0.0f : out;  // subnormal: its inverse is not a number
}

// Floats (zero from n to the next whole vector) into codes: up or down at random, in proportion to
// the distances, so that the mean of what is decoded is x. What is not zero and has no sign stays
// above zero: a second moment of zero would make the step endless.
template <class C>
INLINE void encode_block(const float* x, uint8_t* codes, float* scale, i64 n, uint32_t key, i64 at) {
  const float absmax = *scale = largest_magnitude(x, n);
  const bool finite = absmax < __builtin_inff();
  const Vec inverse = set1(absmax > 0.0f && finite ? 1.0f / absmax : 0.0f), unit = set1(C::kUnit);
  Random random(key, at);
  for (i64 i = 0; i < n; i += W) {
    const Vec v = load(x + i);
    // not finite: any code, for the scale makes it NaN or inf
    const Vec y = finite ? Vec{(Floats)magnitude(v)} * inverse * unit : zero();
    const Words low = C::low(y);
    const Vec below = C::value(low), above = C::value(low + 1u);
    // true is all ones, that is -1
    Words code = low - less(fraction<!C::kSigned>(random.take()) * (above - below), y - below);
    code = pick_words((Words)((Ints)code > int32_t(C::kMost)), words(C::kMost), code);
    if constexpr (C::kSigned)
      code = C::put((Words)v.v, code);
    else
      code = code - ((Words)(code == 0u) & less(zero(), y));
    if (i + W <= n) {
      store_bytes(codes + i, code);
    } else {
      uint8_t rest[W];
      store_bytes(rest, code);
      for (i64 k = i; k < n; ++k) codes[k] = rest[k - i];
    }
  }
}

// bfloat16, up or down at random.
typedef uint16_t Halves __attribute__((vector_size(W * 2)));
INLINE void store_stochastic(bf16* p, Vec a, Words random, i64 n) {
  const Words bits = (Words)a.v, nan = (Words)(a.v != a.v);
  const Words made = pick_words(nan, bits | 0x400000u, bits + (random & 0xffffu)) >> 16;
  const Halves half = __builtin_convertvector(made, Halves);
  __builtin_memcpy(p, &half, 2 * (n < W ? n : W));
}

// 8-bit codes of optimizer states, and the random numbers that round them without bias.

typedef uint32_t Words __attribute__((vector_size(W * 4)));
typedef int32_t Ints __attribute__((vector_size(W * 4)));
typedef decltype(Vec::v) Floats;
typedef decltype(load_bytes(nullptr)) Lane32;

INLINE Words words(uint32_t x) { return Words{} + x; }
INLINE Vec from_int(Words a) { return {(Floats)__builtin_convertvector((Ints)a, Floats)}; }
// Towards zero; a is in the range of int.
INLINE Words to_int(Vec a) { return (Words)__builtin_convertvector(a.v, Ints); }
INLINE Words pick_words(Words mask, Words yes, Words no) { return (mask & yes) | (~mask & no); }
INLINE Words less(Vec a, Vec b) { return (Words)(a.v < b.v); }
INLINE Words magnitude(Vec a) { return (Words)a.v & 0x7fffffffu; }
INLINE Vec quotient(Vec a, Vec b) { return {a.v / b.v}; }
INLINE Vec larger(Vec a, Vec b) { return {a.v < b.v ? b.v : a.v}; }

// A counter-based generator: an element's bits follow from its index and the tensor's key, so that
// they do not depend on threads or on the width of a vector.
INLINE uint32_t mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x21f0aaadu;
  x ^= x >> 15;
  x *= 0x735a2d97u;
  return x ^ (x >> 15);
}
// Random bits for each of kDealt elements in a row: 23 bits that depend on the place, xor a number of
// the group's own. An element's bits are even over keys, which is what rounding needs. They lie in
// the fraction of a float from 1 to 2.
constexpr i64 kDealt = 4 * kScaled;
constexpr uint32_t kGolden = 0x9e3779b9u, kFraction = 0x7fffffu, kOne = 0x3f800000u;
constexpr uint32_t kBelow = 0xfffffu;  // the bits of a float's fraction below the first three
// In a byte that begins at bit 20, adding this takes 0x38000000 away: the smallest of Octaves.
constexpr uint32_t kLeast = 0x08000000u;
struct alignas(64) Dealt {
  uint32_t at[kDealt];
};
constexpr Dealt deal(uint32_t mask, uint32_t more) {
  Dealt out{};
  for (uint32_t i = 0; i < kDealt; ++i) {
    uint32_t x = i * kGolden;
    x ^= x >> 16;
    x *= 0x21f0aaadu;
    x ^= x >> 15;
    x *= 0x735a2d97u;
    out.at[i] = ((x ^ (x >> 15)) & mask) | more;
  }
  return out;
}
constexpr Dealt kDeal = deal(kFraction, kOne), kDealBelow = deal(kBelow, 0);

// From element `at` on, to the end of its group; signed and unsigned codes have bits of their own.
struct Random {
  Words group[2], group_below[2];
  const uint32_t *next, *next_below;

  INLINE_MEMBER Random(uint32_t key, i64 at) {
    const uint64_t number = uint64_t(at / kDealt);
    const uint32_t one = mixed(uint32_t(number) * kGolden + mixed(uint32_t(number >> 32)) + key);
    const uint32_t two = mixed(one);
    group[0] = words(one & kFraction), group[1] = words(two & kFraction);
    group_below[0] = words(one & kBelow), group_below[1] = words((two & kBelow) | kLeast);
    next = kDeal.at + at % kDealt;
    next_below = kDealBelow.at + at % kDealt;
  }
  template <bool Signed>
  INLINE_MEMBER Words bits() const {
    Words x;
    __builtin_memcpy(&x, next, sizeof(x));
    return x ^ group[!Signed];
  }
  // The lower 20 of the bits; above them zeros, or for unsigned codes kLeast.
  template <bool Signed>
  INLINE_MEMBER Words below() const {
    Words x;
    __builtin_memcpy(&x, next_below, sizeof(x));
    return x ^ group_below[!Signed];
  }
  // The bits as a number in [0, 1).
  template <bool Signed>
  INLINE_MEMBER Vec share() const {
    return Vec{(Floats)bits<Signed>()} - set1(1.0f);
  }
  INLINE_MEMBER void skip() { next += W, next_below += W; }
};
INLINE Words above_or(Words low, Vec threshold, Vec y) {
  return threshold.v < y.v ? low + 1u : low;
}

// Each code: numbers in units of scale / kUnit. get(bytes) are the numbers of W codes; put(v, factor,
// random) is the code of v, whose number is v factor, up or down in proportion to the distances, so
// that the mean of what is decoded is v. What is not finite takes any code, for the scale makes it
// NaN or inf. kZero: a second moment has to be kept from code 0.

// Octaves: each power of two has 8 codes, as a float with three bits of fraction has. Adding random
// bits to a float's own, below those that are kept, is the whole of the rounding. Signed: a sign and
// 16 octaves of the magnitude + 2^-15, which makes zero a code and small numbers evenly spaced.
struct SignedOctaves {
  static constexpr float kOffset = 0x1p-15f, kUnit = 1.875f - kOffset;
  static constexpr bool kZero = false;
  INLINE_MEMBER static Vec offset(Vec like) {
    return {(Floats)(((Words)like.v & 0x80000000u) | 0x38000000u)};
  }
  INLINE_MEMBER static Words put(Vec v, Vec factor, const Random& random) {
    const Words x = (Words)fma(v, factor, offset(v)).v + random.below<true>();
    return (x >> 20 & 0x7fu) | (x >> 24 & 0x80u);
  }
  INLINE_MEMBER static Vec get(const uint8_t* codes) {
    const Words byte = (Words)load_signed_bytes(codes);
    const Vec x = {(Floats)((byte << 20 & 0x87f00000u) | 0x38000000u)};
    return x - offset(x);
  }
};
// Unsigned: 32 octaves below the largest, counted from -128, and no zero.
struct Octaves {
  static constexpr float kUnit = 1.875f;
  static constexpr bool kZero = false;
  INLINE_MEMBER static Words put(Vec v, Vec factor, const Random& random) {
    const Vec y = at_least(v * factor, set1(0x1p-31f));
    return ((Words)y.v + random.below<false>()) >> 20;
  }
  INLINE_MEMBER static Vec get(const uint8_t* codes) {
    return {(Floats)(((Words)load_signed_bytes(codes) << 20) + 0x38000000u)};
  }
};
// e4m3: 4 exponent bits with bias 7, 3 bits of mantissa, 448 the largest. Below 2^-6 its codes are
// evenly spaced, as floats with three bits of fraction are from 2^-6 to 2^-5: numbers are moved there.
constexpr uint32_t kEven = 0x3c800000u, kRising = 0x3c000000u;  // what code 0 would have as a float
INLINE Vec from_e4m3(Words c) {
  const Words first = c < 8u ? words(kEven) : words(kRising);
  const Vec off = {(Floats)(c < 8u ? words(kEven) : words(0))};
  return Vec{(Floats)((c << 20) + first)} - off;
}
// A number's place: float bits whose code is place.code() of them.
struct Place {
  Words bits, first;
  Vec off;

  INLINE_MEMBER explicit Place(Vec a) {
    const Vec edge = set1(0x1p-6f);
    off = {a.v < edge.v ? edge.v : zero().v};
    first = a.v < edge.v ? words(kEven) : words(kRising);
    bits = (Words)(a + off).v;
  }
  INLINE_MEMBER Words code(Words x) const { return (x - first) >> 20; }
};
struct Fp8 {
  static constexpr float kUnit = 448.0f;
  static constexpr bool kZero = false;
  INLINE_MEMBER static Words put(Vec v, Vec factor, const Random& random) {
    const Place place(Vec{(Floats)magnitude(v)} * factor);
    return place.code(place.bits + random.below<true>()) | ((Words)v.v >> 31 << 7);
  }
  INLINE_MEMBER static Vec get(const uint8_t* codes) {
    const Words byte = (Words)load_bytes(codes);
    return {(Floats)((Words)from_e4m3(byte & 0x7fu).v | (byte >> 7 << 31))};
  }
};
struct Fp8Square {
  static constexpr float kUnit = 448.0f * 448.0f;
  static constexpr bool kZero = true;
  // A rough root may pick the neighbour of the code next below y; the comparison with value + share *
  // gap then still decides rightly.
  INLINE_MEMBER static Words put(Vec v, Vec factor, const Random& random) {
    const Vec y = v * factor, u = random.share<false>();
    const Place place(rough_root(y));
    const Words low = place.bits & ~kBelow;
    const Vec z = Vec{(Floats)low} - place.off, t = Vec{(Floats)(low + 0x100000u)} - place.off;
    const Vec value = z * z;
    return above_or(place.code(low), fma(u, t * t - value, value), y);
  }
  INLINE_MEMBER static Vec get(const uint8_t* codes) {
    const Vec z = from_e4m3((Words)load_bytes(codes));
    return z * z;
  }
};

// kScaled or fewer codes into floats; what lies between n and the next whole vector is zero.
template <class C>
INLINE void decode_block(const uint8_t* codes, float scale, float* x, i64 n) {
  const Vec unit = set1(scale * (1.0f / C::kUnit));
  i64 i = 0;
  for (; i + W <= n; i += W) store(x + i, C::get(codes + i) * unit);
  if (i < n) {
    uint8_t rest[W] = {};
    for (i64 k = i; k < n; ++k) rest[k - i] = codes[k];
    store(x + i, C::get(rest) * unit);
  }
}

// The larger bits lane by lane: of magnitudes, NaN above inf above all others.
INLINE Words larger_bits(Words a, Words b) { return a > b ? a : b; }

// The scale of a block from the lanes' largest magnitudes: at least so large that unit / scale is a
// number, and 0 for a block of nothing but zeros and subnormals.
template <class C>
INLINE float scale_of(Words top) {
  const uint32_t bits = top_bits({(Floats)top});
  float out;
  __builtin_memcpy(&out, &bits, 4);
  const float least = C::kUnit * 0x1p-126f;
  return bits < 0x00800000u ? 0.0f : out < least ? least : out;
}

template <class C>
INLINE float scale_of(const float* x, i64 n) {
  Words top = words(0);
  for (i64 i = 0; i < n; i += W) top = larger_bits(top, magnitude(load(x + i)));
  return scale_of<C>(top);
}

// What turns numbers into codes of a block. The unit is a little short, so that rounding never
// takes the largest magnitude past the last code.
template <class C>
struct Coder {
  Vec factor;
  Words least_code;  // no second moment next to a larger one is zero: steps would be endless

  INLINE_MEMBER explicit Coder(float scale) {
    const bool usable = scale > 0.0f && scale < __builtin_inff();
    factor = set1(usable ? C::kUnit * (1.0f - 0x1p-22f) / scale : 0.0f);
    least_code = words(usable ? 1u : 0u);
  }
  INLINE_MEMBER Words code(Vec v, const Random& random) const {
    const Words made = C::put(v, factor, random);
    return C::kZero ? larger_bits(made, least_code) : made;
  }
};

// Floats (zero from n to the next whole vector) into codes.
template <class C>
INLINE void encode_block(const float* x, uint8_t* codes, float* scale, i64 n, uint32_t key, i64 at) {
  const Coder<C> coder(*scale = scale_of<C>(x, n));
  Random random(key, at);
  for (i64 i = 0; i < n; i += W, random.skip()) {
    const Words code = coder.code(load(x + i), random);
    if (i + W <= n) {
      store_bytes(codes + i, (Lane32)code);
    } else {
      uint8_t rest[W];
      store_bytes(rest, (Lane32)code);
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

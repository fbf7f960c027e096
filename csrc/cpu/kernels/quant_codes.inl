// Numbers in units of their scale to codes and back, W at a time.
#pragma once

typedef uint32_t Words __attribute__((vector_size(W * 4)));
typedef int32_t Ints __attribute__((vector_size(W * 4)));
typedef uint16_t Halves __attribute__((vector_size(W * 4)));
typedef decltype(Vec::v) Floats;
typedef decltype(load_bytes(nullptr)) Lane32;

#include "cpu/simd/bytes.h"

template <class V, class T>
INLINE V read_as(const T* p) {
  V out;
  __builtin_memcpy(&out, p, sizeof(out));
  return out;
}
INLINE Words words(uint32_t x) { return Words{} + x; }
INLINE Words bits_of(Vec a) { return (Words)a.v; }
INLINE Vec as_float(Words a) { return {(Floats)a}; }
INLINE Vec from_int(Words a) { return {(Floats)__builtin_convertvector((Ints)a, Floats)}; }
INLINE Words pick(Words mask, Words yes, Words no) { return (mask & yes) | (~mask & no); }
INLINE Words larger(Words a, Words b) { return a > b ? a : b; }
INLINE Vec within(Vec a, float low, float high) {
  return at_most(at_least(a, set1(low)), set1(high));
}
INLINE uint32_t bits_of(float x) {
  uint32_t out;
  __builtin_memcpy(&out, &x, 4);
  return out;
}
INLINE float as_float(uint32_t bits) {
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

// Adding it rounds a float below 2^22 half to even, and leaves the integer in the low bits.
constexpr float kRound = 12582912.0f;

struct alignas(64) Table {
  float at[16];
};

// Each kind: code<Tame>(q, x, zero) are the codes of numbers q = x / scale, signed bytes in the lanes
// (packed: below 16); Tame: the scale is the group's own and no subnormal number, so that q is
// hardly past the ends. value(codes, zero) is what codes stand for, one in each lane. kZero is the
// code of 0, kMost the largest number; kBounded: no code stands for a number twice as large.
struct Int8 {
  static constexpr bool kPacked = false;
  static constexpr uint8_t kZero = 0;
  static constexpr float kMost = 127.0f;
  static constexpr bool kBounded = true;
  template <bool Tame>
  INLINE_MEMBER static Words code(Vec q, Vec, Vec) {
    return bits_of((Tame ? q : within(q, -127.0f, 127.0f)) + set1(kRound)) - bits_of(kRound);
  }
  INLINE_MEMBER static Vec value(Words codes, Vec) {
    return from_int((Words)((Ints)(codes << 24) >> 24));
  }
};
struct Int4 {
  static constexpr bool kPacked = true;
  static constexpr uint8_t kZero = 8;
  static constexpr float kMost = 8.0f;
  static constexpr bool kBounded = true;
  template <bool Tame>
  INLINE_MEMBER static Words code(Vec q, Vec, Vec) {
    q = Tame ? at_most(q, set1(7.0f)) : within(q, -8.0f, 7.0f);
    return bits_of(q + set1(kRound + 8.0f)) & 15u;
  }
  INLINE_MEMBER static Vec value(Words codes, Vec) { return from_int(codes) - set1(8.0f); }
};
// With a zero point, which is a whole number where codes are made.
struct Int4Zero {
  static constexpr bool kPacked = true;
  static constexpr uint8_t kZero = 0;
  static constexpr float kMost = 15.0f;
  static constexpr bool kBounded = false;
  template <bool Tame>
  INLINE_MEMBER static Words code(Vec q, Vec, Vec zero) {
    // rounded first, then moved: the other way round ties would go to another even number
    const Vec held = at_most(at_least(q, set1(0.0f) - zero), set1(15.0f) - zero);
    return bits_of(held + set1(kRound)) + (bits_of(zero + set1(kRound)) - 2u * bits_of(kRound));
  }
  INLINE_MEMBER static Vec value(Words codes, Vec zero) { return from_int(codes) - zero; }
};

// A float with `Bits` of mantissa and the exponent bias `Bias` in a byte; `Top` is the largest
// number. What is below the smallest normal one is a multiple of its last bit.
template <int Bits, int Bias, int Top, bool Infinite>
struct Fp8 {
  static constexpr bool kPacked = false;
  static constexpr uint8_t kZero = 0;
  static constexpr int kDrop = 23 - Bits;
  static constexpr uint32_t kRebias = uint32_t(127 - Bias) << 23;
  static constexpr uint32_t kLeast = uint32_t(128 - Bias) << 23;  // the smallest normal number
  static constexpr uint32_t kStep = uint32_t(128 - Bias - Bits) << 23;  // the last bit below it
  static constexpr float kMost = float(Top);
  static constexpr bool kBounded = true;
  template <bool Tame>
  INLINE_MEMBER static Words code(Vec q, Vec x, Vec) {
    Vec size = as_float(bits_of(q) & 0x7fffffffu);
    if (!Tame) size = at_most(size, set1(kMost));
    // a power of two whose last bit is that of the codes around size: the sum rounds to it
    const Words round = larger(bits_of(size) & 0x7f800000u, words(kLeast)) + (uint32_t(kDrop) << 23);
    const Words steps = bits_of(size + as_float(round)) - round;
    const Words code = steps + ((round >> kDrop) - (((kLeast >> 23) + kDrop) << Bits));
    return code | ((Words)((Ints)bits_of(x) >> 24) & ~0x7fu);
  }
  // 2 W codes' values in units of kHalfUnit, where W is 16: the bits of numbers of type f16.
  static constexpr float kHalfUnit = float(1 << (15 - Bias));
  INLINE_MEMBER static void two_values(const uint8_t* codes, Vec& a, Vec& b) {
    typedef int8_t Bytes __attribute__((vector_size(W * 2)));
    typedef int16_t Shorts __attribute__((vector_size(W * 4)));
    Shorts half = __builtin_convertvector(read_as<Bytes>(codes), Shorts) << (10 - Bits);
    if (!Infinite) {
      half &= int16_t(~0x4000);  // the sign, once more
      half |= (Shorts)((half & 0x7fff) == 0x3f80) & 0x7e00;  // NaN
    }
    halves_as_floats((Lane32)half, a, b);
  }
  INLINE_MEMBER static Vec value(Words codes, Vec) {
    const Words size = codes & 0x7fu;
    const Words normal = (size << kDrop) + kRebias;
    const Vec small = from_int(size) * set1(as_float(kStep));
    Words out = pick((Words)(size < (1u << Bits)), bits_of(small), normal);
    if (Infinite) {  // the last exponent holds infinity and NaN
      out = pick((Words)(size >= 0x7cu), (size << kDrop) + 2u * kRebias, out);
    } else {
      out = pick((Words)(size == 0x7fu), words(0x7fc00000u), out);
    }
    return as_float(out | (codes >> 7 << 31));
  }
};
using E4m3 = Fp8<3, 7, 448, false>;
using E5m2 = Fp8<2, 15, 57344, true>;

// 2^e of an e8m0 byte; 255 is NaN.
INLINE float power_of(uint8_t byte) {
  return as_float(byte == 255 ? 0x7fc00000u : byte ? uint32_t(byte) << 23 : 0x00400000u);
}

// 2n nibbles in bytes to n bytes, the even one in the low half.
INLINE void pack_nibbles(const uint8_t* from, uint8_t* to, i64 n) {
  typedef uint16_t Pairs __attribute__((vector_size(32)));
  typedef uint8_t Packed __attribute__((vector_size(16)));
  i64 i = 0;
  for (; i + 16 <= n; i += 16) {
    Pairs p;
    __builtin_memcpy(&p, from + 2 * i, 32);
    const Packed made = __builtin_convertvector((p | p >> 4) & 0xff, Packed);
    __builtin_memcpy(to + i, &made, 16);
  }
  for (; i < n; ++i) to[i] = uint8_t(from[2 * i] | from[2 * i + 1] << 4);
}

INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }

// Lanes of a, or of b where their number has bit `Half`: they themselves, and those whose number
// differs in that bit.
template <int Half>
INLINE void halves(Vec a, Vec b, Vec& here, Vec& there) {
  Ints own, other;
  for (int i = 0; i < W; ++i) {
    own[i] = i + (i & Half ? W : 0);
    other[i] = own[i] ^ Half;
  }
#if defined(__clang__)
  float lanes[2 * W], first[W], second[W];
  store(lanes, a), store(lanes + W, b);
  for (int i = 0; i < W; ++i) first[i] = lanes[own[i]], second[i] = lanes[other[i]];
  here = load(first), there = load(second);
#else
  here = {__builtin_shuffle(a.v, b.v, own)};
  there = {__builtin_shuffle(a.v, b.v, other)};
#endif
}

// The lanes of a and b in turn.
INLINE void zip(Vec a, Vec b, Vec& first, Vec& second) {
#if defined(__clang__)
  float lanes[2 * W];
  for (int i = 0; i < W; ++i) lanes[2 * i] = a.v[i], lanes[2 * i + 1] = b.v[i];
  first = load(lanes), second = load(lanes + W);
#else
  Ints low, high;
  for (int i = 0; i < W; ++i) {
    low[i] = i / 2 + i % 2 * W;
    high[i] = low[i] + W / 2;
  }
  first = {__builtin_shuffle(a.v, b.v, low)};
  second = {__builtin_shuffle(a.v, b.v, high)};
#endif
}

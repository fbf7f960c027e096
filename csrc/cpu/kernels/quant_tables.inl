// nf4 and fp4: the nearest of sixteen numbers.
#pragma once

// In the order of their codes. fp4: a sign bit above eight magnitudes.
constexpr Table kNf4Values = {{-1.0f, -0.6961928009986877f, -0.5250730514526367f,
                               -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
                               -0.09105003625154495f, 0.0f, 0.07958029955625534f,
                               0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                               0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,
                               1.0f}};
constexpr Table kFp4Values = {{0.0f, float(0.0625 / 12), float(8.0 / 12), 1.0f,
                               float(4.0 / 12), 0.5f, float(2.0 / 12), 0.25f,
                               -0.0f, float(-0.0625 / 12), float(-8.0 / 12), -1.0f,
                               float(-4.0 / 12), -0.5f, float(-2.0 / 12), -0.25f}};

// The codes of `count` numbers by size, and the thresholds between them.
struct Ladder {
  int count;
  uint8_t code[16];
  Table limit;
  constexpr Ladder(const Table& values, int n, const uint8_t (&order)[16])
      : count(n), code{}, limit{} {
    for (int i = 0; i < n; ++i) code[i] = order[i];
    for (int i = 0; i + 1 < n; ++i)
      limit.at[i] = (values.at[order[i]] + values.at[order[i + 1]]) / 2;
    for (int i = n - 1; i < 16; ++i) limit.at[i] = 2.0f;  // above all numbers
  }
};
constexpr Ladder kNf4Ladder{kNf4Values, 16, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};
constexpr Ladder kFp4Ladder{kFp4Values, 15, {11, 10, 13, 12, 15, 14, 9, 0, 1, 6, 7, 4, 5, 2, 3, 0}};

// [-1, 1] in 31 cells with one threshold each at most: it, and the codes below it and, four bits
// up, above it. Fractions: thresholds lie at parts of as many, or where rounding has put them, and
// are moved aside by some units in the last place, so that quotients as far from them as rounding
// leaves them do not change sides. Numbers of 16 bits have no other quotients so near.
template <int Lanes>
struct alignas(64) Cells {
  static constexpr float kWide = 15.0f, kFirst = 16.0f;
  float limit[32];
  uint32_t codes[32];
  static constexpr float aside(float at, int fractions) {
    if (fractions == 0) return at;
    const float part = float(int(at * fractions + (at < 0 ? -0.5f : 0.5f)) / double(fractions));
    const float step = (at < 0 ? -at : at) * 0x1p-21f;
    return part > at ? at - step : at + step;
  }
  constexpr Cells(const Ladder& l, int fractions) : limit{}, codes{} {
    for (int i = 0; i < 32; ++i) limit[i] = 2.0f;
    for (int i = 0; i + 1 < l.count; ++i) {
      const float at = l.limit.at[i];
      limit[int(double(at) * kWide + kFirst)] = aside(at, fractions);
    }
    for (int i = 0, below = 0; i < 32; ++i) {
      codes[i] = l.code[below];
      if (limit[i] < 2.0f) ++below;
      codes[i] |= uint32_t(l.code[below]) << 4;
    }
  }
  INLINE_MEMBER Words code(Vec q) const {
    const Lane32 cell = (Lane32)floored(q, kWide, kRound + kFirst);
    const Lane32 limits[2] = {read_as<Lane32>(limit), read_as<Lane32>(limit + Lanes)};
    const Lane32 pairs[2] = {read_as<Lane32>(codes), read_as<Lane32>(codes + Lanes)};
    return (Words)shifted_above(lookup_32(pairs, cell), q, lookup_32(limits, cell)) & 15u;
  }
};
// The thresholds from number 2^k - 1 on, for each step of a binary search.
struct Steps {
  Table by8, by4, by2, by1, codes;
  static constexpr Table from(const Table& t, int by) {
    Table out{};
    for (int i = 0; i + by < 16; ++i) out.at[i] = t.at[i + by];
    return out;
  }
  constexpr Steps(const Ladder& l, int)
      : by8(from(l.limit, 7)), by4(from(l.limit, 3)), by2(from(l.limit, 1)), by1(l.limit), codes{} {
    for (int i = 0; i < 16; ++i) codes.at[i] = float(l.code[i]);
  }
  INLINE_MEMBER Words count_below(Vec q) const {
    Words n = words(0);
    if (W == 4) {
      for (int i = 0; i < 15; ++i) n -= (Words)(set1(by1.at[i]).v < q.v);
      return n;
    }
    n = (Words)(set1(by8.at[0]).v < q.v) & 8u;
    n += (Words)(lookup(by4.at, (Lane32)n).v < q.v) & 4u;
    n += (Words)(lookup(by2.at, (Lane32)n).v < q.v) & 2u;
    n += (Words)(lookup(by1.at, (Lane32)n).v < q.v) & 1u;
    return n;
  }
  INLINE_MEMBER Words code(Vec q) const {
    return bits_of(lookup(codes.at, (Lane32)count_below(q)) + set1(kRound)) & 15u;
  }
};
using Search = std::conditional_t<W == 16, Cells<W>, Steps>;

struct Nf4 {
  static constexpr bool kPacked = true;
  static constexpr uint8_t kZero = 7;
  static constexpr float kMost = 1.0f;
  static constexpr bool kBounded = true;
  static constexpr Search kSearch{kNf4Ladder, 0}, kNear = kSearch;
  template <bool Tame>
  INLINE_MEMBER static Words code(Vec q, Vec, Vec) {
    return kSearch.code(Tame ? q : within(q, -kMost, kMost));
  }
  INLINE_MEMBER static Vec value(Words codes, Vec) {
    return lookup(kNf4Values.at, (Lane32)codes);
  }
};
struct Fp4 {
  static constexpr bool kPacked = true;
  static constexpr uint8_t kZero = 0;
  static constexpr float kMost = 1.0f;
  static constexpr bool kBounded = true;
  static constexpr Search kSearch{kFp4Ladder, 0}, kNear{kFp4Ladder, 384};
  template <bool Tame>
  INLINE_MEMBER static Words code(Vec q, Vec, Vec) {
    return kSearch.code(Tame ? q : within(q, -kMost, kMost));
  }
  INLINE_MEMBER static Vec value(Words codes, Vec) {
    return lookup(kFp4Values.at, (Lane32)codes);
  }
};

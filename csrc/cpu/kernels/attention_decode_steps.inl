// A step of attention with few queries: their products with some keys, and sums of some values,
// both read where they lie, as numbers or as codes that only registers see in full.

constexpr i64 kFewQueries = 16, kGlance = 64;  // rows; keys of a step
constexpr i64 kMostBlock = 128, kMostNumbers = 256;  // numbers read at a time; of a row
constexpr int kTogether = W == 16 ? 4 : 2;  // queries that the registers hold at a time

// What a step has: n keys, or values, of `width` numbers. Codes of groups come with scales and
// zeros [n][groups].
struct Step {
  i64 rows, n, width;
  const char *from, *next;  // next: n rows to ask for meanwhile, or null
  i64 stride, next_stride, next_bytes;
  i64 group, groups;
  const float *scales, *zeros;
  float* weights;  // [rows][kGlance]: made of keys, used by values
  float* numbers;  // [rows][padded]: queries, or sums of values
  i64 padded;
};

// Each source reads kParts vectors of a row from number `at` on, a multiple of their lanes: of two
// parts, the first has the even numbers. With kGrouped they are code - zero in units of scales.
template <class T>
struct Numbers {
  static constexpr int kParts = 1;
  static constexpr bool kGrouped = false;
  template <class L>
  INLINE_MEMBER static void read(const char* row, i64 at, L lanes, Vec* out) {
    out[0] = get((const T*)row + at, lanes);
  }
};
template <bool Grouped>
struct ByteCodes {
  static constexpr int kParts = 1;
  static constexpr bool kGrouped = Grouped, kHasZeros = false;
  INLINE_MEMBER static void read(const char* row, i64 at, All, Vec* out) {
    const Ints codes = (Ints)load_signed_bytes((const uint8_t*)row + at);
    out[0] = {__builtin_convertvector(codes, Floats)};
  }
  INLINE_MEMBER static void read(const char* row, i64 at, First lanes, Vec* out) {
    char rest[W] = {};
    __builtin_memcpy(rest, row + at, lanes.n);
    read(rest, 0, All{}, out);
  }
};
// Without groups, whose zeros may be any: codes - 8.
template <bool Grouped>
struct NibbleCodes {
  static constexpr int kParts = 2;
  static constexpr bool kGrouped = Grouped, kHasZeros = true;
  INLINE_MEMBER static void read(const char* row, i64 at, All, Vec* out) {
    alignas(64) static constexpr float kFrom0[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                     8, 9, 10, 11, 12, 13, 14, 15};
    alignas(64) static constexpr float kFrom8[16] = {-8, -7, -6, -5, -4, -3, -2, -1,
                                                     0,  1,  2,  3,  4,  5,  6,  7};
    const float* table = Grouped ? kFrom0 : kFrom8;
    using Lanes = decltype(load_bytes(nullptr));
    const Ints both = (Ints)load_bytes((const uint8_t*)row + at / 2);
    // wider lookups see no more than four bits
    out[0] = lookup(table, (Lanes)(W == 4 ? both & 15 : both));
    out[1] = lookup(table, (Lanes)(both >> 4));
  }
  INLINE_MEMBER static void read(const char* row, i64 at, First lanes, Vec* out) {
    char rest[W] = {};
    __builtin_memcpy(rest, row + at / 2, (lanes.n + 1) / 2);
    read(rest, 0, All{}, out);
  }
};

// Numbers of group g of row r; the step's scales are of rows from the first one on.
template <class S>
INLINE void in_units(const Step& s, i64 r, i64 g, Vec* out) {
  if constexpr (S::kGrouped) {
    const Vec scale = set1(s.scales[r * s.groups + g]);
#pragma GCC unroll 2
    for (int p = 0; p < S::kParts; ++p) {
      if (S::kHasZeros) out[p] = out[p] - set1(s.zeros[r * s.groups + g]);
      out[p] = out[p] * scale;
    }
  }
}

// Asks for rows of what is read next: they lie pages apart, where the hardware does not look.
INLINE void ask(const Step& s, i64 r, int count) {
  for (int i = 0; i < count; ++i)
    for (i64 at = 0; at < s.next_bytes; at += 64)
      __builtin_prefetch(s.next + (r + i) * s.next_stride + at, 0, 2);
}

// Products of some keys, from r on, with some queries, from i on.
template <class S, int Keys, int Queries>
INLINE void products(const Step& s, i64 r, i64 i) {
  constexpr i64 kWide = S::kParts * W;
  const char* k = s.from + r * s.stride;
  const float* q = s.numbers + i * s.padded;
  Vec sum[Queries][4];
#pragma GCC unroll 4
  for (int l = 0; l < Queries; ++l)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[l][j] = zero();
  const auto add = [&](auto lanes, i64 at, i64 g) INLINE_LAMBDA {
    Vec key[Keys][S::kParts];
#pragma GCC unroll 4
    for (int j = 0; j < Keys; ++j) {
      S::read(k + j * s.stride, at, lanes, key[j]);
      in_units<S>(s, r + j, g, key[j]);
    }
#pragma GCC unroll 2
    for (int p = 0; p < S::kParts; ++p)
#pragma GCC unroll 4
      for (int l = 0; l < Queries; ++l) {
        const Vec query = load(q + l * s.padded + at + p * W);
#pragma GCC unroll 4
        for (int j = 0; j < Keys; ++j) sum[l][j] = fma(key[j][p], query, sum[l][j]);
      }
  };
  for (i64 g = 0, at = 0; at < s.width; ++g) {
    const i64 end = S::kGrouped ? least(s.width, at + s.group) : s.width;
    for (; at + kWide <= end; at += kWide) add(All{}, at, g);
    if (at < end) add(First{int(end - at)}, at, g);
    at = end;
  }
#pragma GCC unroll 4
  for (int l = 0; l < Queries; ++l) {
    float four[4];
    hsum4(sum[l], four);
    for (int j = 0; j < Keys; ++j) s.weights[(i + l) * kGlance + r + j] = four[j];
  }
}
template <class S, int Queries>
INLINE void score_rows(const Step& s, i64 i) {
  i64 r = 0;
  for (; r + 4 <= s.n; r += 4) {
    if (i == 0 && s.next) ask(s, r, 4);
    products<S, 4, Queries>(s, r, i);
  }
  for (; r < s.n; ++r) products<S, 1, Queries>(s, r, i);
}
template <class S>
APART void score_step(const Step& s) {
  i64 i = 0;
  for (; i + kTogether <= s.rows; i += kTogether) score_rows<S, kTogether>(s, i);
  for (; i < s.rows; ++i) score_rows<S, 1>(s, i);
}

// Sums of some queries, `at` and what follows of them: += weights times the values.
template <class S, int Queries, int Blocks, class L>
INLINE void mix_part(const Step& s, i64 i, i64 at, L lanes) {
  constexpr int kVectors = Blocks * S::kParts;
  const bool asks = s.next && i == 0 && at == 0;
  const float* weights = s.weights + i * kGlance;
  float* out = s.numbers + i * s.padded + at;
  Vec sum[Queries][kVectors];
#pragma GCC unroll 4
  for (int l = 0; l < Queries; ++l)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[l][j] = load(out + l * s.padded + j * W);
  i64 group[Blocks] = {};
  if (S::kGrouped)
    for (int b = 0; b < Blocks; ++b) group[b] = (at + b * S::kParts * W) / s.group;
  for (i64 r = 0; r < s.n; ++r) {
    if (asks) ask(s, r, 1);
    Vec value[kVectors];
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) {
      S::read(s.from + r * s.stride, at + b * S::kParts * W, lanes, value + b * S::kParts);
      in_units<S>(s, r, group[b], value + b * S::kParts);
    }
#pragma GCC unroll 4
    for (int l = 0; l < Queries; ++l) {
      const Vec w = set1(weights[l * kGlance + r]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[l][j] = fma(w, value[j], sum[l][j]);
    }
  }
#pragma GCC unroll 4
  for (int l = 0; l < Queries; ++l)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(out + l * s.padded + j * W, sum[l][j]);
}
template <class S, int Queries>
INLINE void mix_rows(const Step& s, i64 i) {
  constexpr int kBlocks = 4 / S::kParts;
  constexpr i64 kWide = S::kParts * W;
  i64 at = 0;
  for (; at + kBlocks * kWide <= s.width; at += kBlocks * kWide)
    mix_part<S, Queries, kBlocks>(s, i, at, All{});
  for (; at + kWide <= s.width; at += kWide) mix_part<S, Queries, 1>(s, i, at, All{});
  if (at < s.width) mix_part<S, Queries, 1>(s, i, at, First{int(s.width - at)});
}
template <class S>
APART void mix_step(const Step& s) {
  i64 i = 0;
  for (; i + kTogether <= s.rows; i += kTogether) mix_rows<S, kTogether>(s, i);
  for (; i < s.rows; ++i) mix_rows<S, 1>(s, i);
}

// How keys and values of a kind are read, `block` numbers at a time: a block's number i lies at
// query_place(i) of a query and at sum_place(i) of a sum.
struct Reader {
  void (*score)(const Step&);
  void (*mix)(const Step&);
  void (*prepare)(float* query, i64 padded);  // or null
  int (*query_place)(int);
  int (*sum_place)(int);
  i64 block, bits;  // bits of a number as stored
  bool grouped;     // else, of codes, one scale is for all of a row
};
template <class S>
int place(int i) {
  return i % S::kParts * W + i / S::kParts;
}
template <class S>
constexpr Reader reader_of(i64 bits) {
  return {score_step<S>, mix_step<S>, nullptr, place<S>, place<S>, S::kParts * W, bits,
          S::kGrouped};
}

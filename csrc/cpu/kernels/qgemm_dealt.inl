// Nibbles without moving any between lanes: 64 bytes hold a block of 128, and word i of them stands
// for elements 8 i to 8 i + 7. What they meet is dealt out to match. Four blocks are a stretch:
// their scales are read at once, one lane for each group.

constexpr i64 kDealt = 128, kStretch = 512;

// Where the lanes of a stretch's blocks find their groups' scales.
struct Lanes {
  int shift;         // a group is 2^shift elements
  IntVec spread[4];  // lane of block q -> lane of the stretch's scales
  i64 groups;        // of a row
  explicit INLINE_MEMBER Lanes(const Weight& w) : shift(40), groups(1) {
    if (w.group) {
      shift = __builtin_ctzll(uint64_t(w.group));
      groups = ceil_div(w.k, w.group);
    }
    for (int q = 0; q < 4; ++q)
      for (int i = 0; i < W; ++i) spread[q][i] = int32_t((q * kDealt + 8 * i) >> shift);
  }
  // The scales (or zeros) p of a row that begins at index `first`, for stretch s.
  INLINE_MEMBER Vec of(const void* p, int type, i64 first, i64 s) const {
    const i64 g = (s * kStretch) >> shift;
    return load_scales(p, type == kScaleFloat32, first + g, groups - g);
  }
  INLINE_MEMBER Vec at(Vec scales, int q) const { return picked(scales, spread[q]); }
};

// Whether a weight's nibbles can be taken this way.
INLINE bool dealable(const Weight& w) {
  const bool groups = w.group == 0 || (w.group >= 32 && (w.group & (w.group - 1)) == 0);
  return two_a_byte(w.kind) && groups && w.scale_block == 1 && w.scale_type <= kScaleBFloat16;
}

// What nibbles stand for, but for scales; int4's are less 8.
INLINE Table numbers_of(int kind) {
  if (kind == kInt4) return shifted(load_table(kIntegers), 8.0f);
  return load_table(kind == kNf4 ? kNf4Values : kFp4Values);
}

// ---- the weight, as pairs of bf16 for tiles and blocks

// As decode_floats makes them, but in a block's own order: word 8 h + j of its quarter t holds
// elements 16 j + s and 16 j + 8 + s, where s = 2 t + h. term: what of the numbers, see rest_of.
APART void decode_dealt(const Weight& w, const Lanes& lanes, i64 row, i64 k0, i64 words, int term,
                        float* out, i64 step) {
  const uint8_t* p = w.codes + row * w.row + k0 / 2;
  const i64 bytes = (w.k + 1) / 2 - k0 / 2, blocks = words / 64, first = scale_index(w, row, 0);
  const Table table = numbers_of(w.kind);
  Vec scales = zero(), shifts = zero();
  for (i64 b = 0; b < blocks; ++b, out += 4 * step) {
    if (b % 4 == 0) {
      const i64 s = (k0 / kDealt + b) / 4;
      scales = lanes.of(w.scales, w.scale_type, first, s);
      if (w.zeros) shifts = (set1(8.0f) - lanes.of(w.zeros, w.scale_type, first, s)) * scales;
    }
    const Vec scale = lanes.at(scales, int(b % 4)), shift = lanes.at(shifts, int(b % 4));
    const IntVec v = load_codes(p + b * 64, bytes - b * 64);
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      const Vec low = fma(lookup(table, v >> (8 * t)), scale, shift);
      const Vec high = fma(lookup(table, v >> (8 * t + 4)), scale, shift);
      if (__builtin_expect(term, 0))
        store_pairs(out + t * step, rest_of(low, term), rest_of(high, term));
      else
        store_pairs(out + t * step, low, high);
    }
  }
}

// Tokens to meet them: a panel [words][width] as pack_panel's.
APART void pack_dealt(const bf16* x, i64 row, i64 rows, i64 k, i64 words, int width, float* out) {
  for (i64 w = 0; w < words; w += W)
    for (int r = 0; r < width; r += W) {
      Vec block[W];
      rows_of<Pair>(x, row, r, rows, w, k, block);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) block[i] = zip_eights(block[i]);
      transpose(block);
      float* to = out + (w / 64 * 64 + w % 64 / 8) * width + r;
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(to + (i % 8 * 8 + i / 8) * width, block[i]);
    }
}

// ---- a few tokens

// Tokens as integers: each block is digits of 7 bits, the largest first, in units of a power of
// two. What is lost is 2^-28 of the largest of 128 numbers, for bf16 2^-21 (and nothing at all
// unless the others are 2^12 times smaller): float32 goes this way where it is `balanced`.
template <class T>
constexpr int digits_of() {
  return std::is_same_v<T, bf16> ? 3 : 4;
}

// What tokens have become: int8 (D = 1), or D digits, and the sums of their groups.
struct Dealt {
  const Lanes* lanes;
  const void* values;   // [M][blocks][D][128]: digits, or [M][blocks][8][16] floats; null: none
  const int32_t* sums;  // [M][blocks][1 or 2][16] of the integers of each word, by halves if D = 4
  const float* units;   // [M][blocks]
  const float* held;    // [M][stretches][16]: the sum over each group of a stretch
  const float* scales;  // [M]
  i64 blocks;           // of a token
};

// Bytes (unsigned a, b) times the 128 of each digit: D = 4 in two halves, so that int32 holds them.
template <int D>
INLINE void dot_digits(IntVec a, IntVec b, const int8_t* digits, IntVec (&out)[2]) {
  constexpr int kFirst = D == 4 ? 2 : D;
#pragma GCC unroll 2
  for (int h = 0; h < (D == 4 ? 2 : 1); ++h) {
    IntVec sum{};
#pragma GCC unroll 4
    for (int d = 0; d < kFirst; ++d, digits += kDealt) {
      if (d) sum = sum << 7;
      sum = dot_bytes(a, load_words(digits), sum);
      sum = dot_bytes(b, load_words(digits + 64), sum);
    }
    out[h] = sum;
  }
}
template <int D>
INLINE Vec joined(const IntVec (&sum)[2]) {
  const Vec high = to_float(sum[0]);
  return D == 4 ? fma(high, set1(16384.0f), to_float(sum[1])) : high;
}

// Dots: block() makes the sums, word by word, of a block's numbers times a token's; int4 is less 8.

// Unsigned nibbles by digits; even elements of a block come first, then the odd ones.
template <int D>
struct NibblesByDigits {
  explicit INLINE_MEMBER NibblesByDigits(int) {}
  template <int M>
  INLINE_MEMBER void block(IntVec v, const Dealt& x, i64 b, Vec (&out)[M]) const {
    constexpr int kHalves = D == 4 ? 2 : 1;
    const IntVec even = low_nibbles(v), odd = low_nibbles(v >> 4);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const i64 at = m * x.blocks + b;
      IntVec sum[2] = {};
      dot_digits<D>(even, odd, (const int8_t*)x.values + at * D * kDealt, sum);
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h)
        sum[h] = sum[h] - load_words(x.sums + (at * kHalves + h) * W);
      out[m] = joined<D>(sum);
      if (D > 1) out[m] = out[m] * set1(x.units[at]);
    }
  }
};

// fp32: element j of each word, for numbers that are no integers.
struct NibblesByFloats {
  Table table;
  explicit INLINE_MEMBER NibblesByFloats(int kind) : table(numbers_of(kind)) {}
  template <int M>
  INLINE_MEMBER void block(IntVec v, const Dealt& x, i64 b, Vec (&out)[M]) const {
    const float* values = (const float*)x.values + b * kDealt;
    Vec sum[M][2];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = zero();
#pragma GCC unroll 8
    for (int s = 0; s < 8; ++s) {
      const Vec n = lookup(table, v >> (4 * s));
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
        sum[m][s % 2] = fma(n, load(values + m * x.blocks * kDealt + 16 * s), sum[m][s % 2]);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) out[m] = sum[m][0] + sum[m][1];
  }
};

// out [R][M] = stretches [begin, end) of R rows of the weight times those of M tokens.
template <int M, int R, class Dot>
INLINE void thin_nibbles(const Weight& w, const Dot& dot, i64 row, const Dealt& x, i64 begin,
                         i64 end, float* out) {
  const Lanes& lanes = *x.lanes;
  const i64 bytes = (w.k + 1) / 2, stretches = ceil_div(x.blocks, 4);
  Vec total[R][M], apart[R][M];
#pragma GCC unroll 16
  for (int i = 0; i < R * M; ++i) total[i / M][i % M] = apart[i / M][i % M] = zero();
  for (i64 s = begin; s < end; ++s) {
    Vec scales[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const i64 first = scale_index(w, row + r, 0);
      scales[r] = lanes.of(w.scales, w.scale_type, first, s);
      if (!w.zeros) continue;
      const Vec worth = (set1(8.0f) - lanes.of(w.zeros, w.scale_type, first, s)) * scales[r];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
        apart[r][m] = fma(worth, load(x.held + (m * stretches + s) * W), apart[r][m]);
    }
    const uint8_t* codes = w.codes + row * w.row + s * (kStretch / 2);
    const i64 left = bytes - s * (kStretch / 2);
    const auto block = [&](int q, bool whole) INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const uint8_t* p = codes + r * w.row + 64 * q;
        if (whole) __builtin_prefetch((const void*)(uintptr_t(p) + 2048));
        const IntVec v = whole ? load_words(p) : load_codes(p, left - 64 * q);
        Vec sums[M];
        dot.template block<M>(v, x, 4 * s + q, sums);
        const Vec scale = lanes.at(scales[r], q);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) total[r][m] = fma(sums[m], scale, total[r][m]);
      }
    };
    if (left >= kStretch / 2) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) block(q, true);
    } else {
      for (int q = 0; q < 4 && 64 * q < left; ++q) block(q, false);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * M; ++i)
    out[i] = hsum(total[i / M][i % M] + apart[i / M][i % M]) * x.scales[i % M];
}

// The same of int8 with one scale a row and D digits: w + 128 is the unsigned side.
template <int M, int D>
INLINE void thin_bytes_by_digits(const Weight& w, i64 row, const Dealt& x, float* out) {
  constexpr int kHalves = D == 4 ? 2 : 1;
  const IntVec flip = IntVec{} + int32_t(0x80808080);
  Vec total[M];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) total[m] = zero();
  for (i64 b = 0; b * kDealt < w.k; ++b) {
    const uint8_t* p = w.codes + row * w.row + b * kDealt;
    const i64 left = w.k - b * kDealt;
    __builtin_prefetch((const void*)(uintptr_t(p) + 2048));
    __builtin_prefetch((const void*)(uintptr_t(p) + 2112));
    const IntVec first = load_codes(p, left) ^ flip, second = load_codes(p + 64, left - 64) ^ flip;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const i64 at = m * x.blocks + b;
      IntVec sum[2] = {};
      dot_digits<D>(first, second, (const int8_t*)x.values + at * D * kDealt, sum);
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h)
        sum[h] = sum[h] - load_words(x.sums + (at * kHalves + h) * W);
      total[m] = fma(joined<D>(sum), set1(x.units[at]), total[m]);
    }
  }
  const float scale = scale_at(w.scales, w.scale_type, scale_index(w, row, 0));
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) out[m] = hsum(total[m]) * scale;
}

// ---- tokens, dealt out

// 128 bytes as a Dot meets them: nibbles' even elements and odd ones apart.
INLINE void deal_bytes(const int8_t* from, bool apart, int8_t* out) {
  if (!apart) {
    __builtin_memcpy(out, from, kDealt);
    return;
  }
  for (int i = 0; i < kDealt / 2; ++i) out[i] = from[2 * i];
  for (int i = 0; i < kDealt / 2; ++i) out[kDealt / 2 + i] = from[2 * i + 1];
}

// What the integers of each word (of both words, for bytes) are worth: `centre` times their sum.
template <int D>
INLINE void sum_digits(const int8_t* digits, int32_t centre, int32_t* sums) {
  const IntVec ones = IntVec{} + 0x01010101;
  IntVec sum[2] = {};
  dot_digits<D>(ones, ones, digits, sum);
  for (int h = 0; h < (D == 4 ? 2 : 1); ++h) store_words(sums + h * W, sum[h] * centre);
}

// Whether digits hold what float32 does: in no block does one number dwarf the others.
APART bool balanced(const float* x, i64 blocks) {
  for (i64 b = 0; b < blocks; ++b, x += kDealt) {
    Vec sum = zero();
    for (int i = 0; i < kDealt; i += W) sum = sum + from_bits(bits_of(load(x + i)) & 0x7fffffff);
    if (hsum(sum) < 5.0f * largest(x, kDealt)) return false;
  }
  return true;
}

// One block of a token in digits; its unit.
template <int D>
APART float deal_digits(const float* x, bool apart, int8_t* out) {
  float unit = largest(x, kDealt);
  uint32_t bits;
  __builtin_memcpy(&bits, &unit, 4);
  const int exponent = int(bits >> 23) - 126 - (7 * D - 1);  // |x| < 2^(7 D - 1) units
  const float back = __builtin_ldexpf(1.0f, exponent < -126 ? 126 : -exponent);
  alignas(64) int8_t plain[D][kDealt];
  for (int i = 0; i < kDealt; i += W) {
    IntVec v = nearest(load(x + i) * set1(back));
#pragma GCC unroll 4
    for (int d = D - 1; d >= 0; --d) {
      const IntVec low = d ? ((v + 64) & 127) - 64 : v;
      store_bytes((uint8_t*)plain[d] + i, (decltype(load_bytes(nullptr)))low);
      v = (v - low) >> 7;
    }
  }
#pragma GCC unroll 4
  for (int d = 0; d < D; ++d) deal_bytes(plain[d], apart, out + d * kDealt);
  return 1.0f / back;
}

// A token's floats as NibblesByFloats meets them.
APART void deal_floats(const float* x, i64 blocks, float* out) {
  for (i64 b = 0; b < blocks; ++b, x += kDealt, out += kDealt)
    for (int j = 0; j < 8; ++j)
      for (int i = 0; i < W; ++i) out[16 * j + i] = x[8 * i + j];
}

// The sums over a token's groups.
template <class X>
APART void hold_groups(const X* x, i64 blocks, const Lanes& lanes, float* held) {
  for (i64 i = 0; i < ceil_div(blocks, 4) * W; ++i) held[i] = 0.0f;
  for (i64 b = 0; b < blocks; ++b, x += kDealt)
    for (int i = 0; i < W; ++i) {
      const X* y = x + 8 * i;
      held[b / 4 * W + lanes.spread[b % 4][i]] +=
          float((y[0] + y[1]) + (y[2] + y[3])) + float((y[4] + y[5]) + (y[6] + y[7]));
    }
}

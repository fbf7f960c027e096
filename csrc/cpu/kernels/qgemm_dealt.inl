// Nibbles without moving any between lanes: 64 bytes hold a block of 128, and word i of them stands
// for elements 8 i to 8 i + 7. What they meet is dealt out to match. Four blocks are a stretch: their
// scales are read at once, one lane for each group.

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

// Tokens as nibbles meet them, and the sums of their groups.
struct Dealt {
  const Lanes* lanes;
  const void* values;   // of a token: blocks of 128, in the order of the dots below; null: none
  const float* held;    // [M][stretches][16]: the sum over each group of a stretch
  const float* scales;  // [M]
  i64 blocks;           // of a token
};

// Dots: block() makes the sums, word by word, of a block's numbers times a token's.

// int8 by unsigned nibbles. Tokens: the even elements of a block, then the odd ones.
struct NibblesByCodes {
  using Token = int8_t;
  static constexpr float kBase = 0.0f;  // the nibble that stands for nothing
  explicit INLINE_MEMBER NibblesByCodes(int) {}
  template <int M>
  INLINE_MEMBER void block(IntVec v, const Dealt& x, i64 b, Vec (&out)[M]) const {
    const IntVec even = low_nibbles(v), odd = low_nibbles(v >> 4);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const int8_t* codes = (const int8_t*)x.values + (m * x.blocks + b) * kDealt;
      const IntVec first = dot_bytes(even, load_words(codes), IntVec{});
      out[m] = to_float(dot_bytes(odd, load_words(codes + 64), first));
    }
  }
  static constexpr i64 place(int i, int j) { return j % 2 * 64 + 4 * i + j / 2; }
};

// bf16 by numbers rounded to bf16. Tokens: pairs of elements j and j + 4 of each word.
struct NibblesByPairs {
  using Token = bf16;
  static constexpr float kBase = 8.0f;
  PairTable table;
  explicit INLINE_MEMBER NibblesByPairs(int kind) : table(pair_table(numbers_of(kind))) {}
  template <int M>
  INLINE_MEMBER void block(IntVec v, const Dealt& x, i64 b, Vec (&out)[M]) const {
    Vec n[4];
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) n[s] = lookup_pairs(table, v >> (4 * s));
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const bf16* values = (const bf16*)x.values + (m * x.blocks + b) * kDealt;
      Vec sum[2] = {zero(), zero()};
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s)
        sum[s % 2] = dot_pairs(n[s], load((const float*)(values + 32 * s)), sum[s % 2]);
      out[m] = sum[0] + sum[1];
    }
  }
  static constexpr i64 place(int i, int j) { return j % 4 * 32 + 2 * i + j / 4; }
};

// fp32. Tokens: element j of each word.
struct NibblesByFloats {
  using Token = float;
  static constexpr float kBase = 8.0f;
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
  static constexpr i64 place(int i, int j) { return 16 * j + i; }
};

// out[M] = one row of the weight times M tokens.
template <int M, class Dot>
INLINE void thin_nibbles(const Weight& w, const Dot& dot, i64 row, const Dealt& x, float* out) {
  const Lanes& lanes = *x.lanes;
  const uint8_t* p = w.codes + row * w.row;
  const i64 bytes = (w.k + 1) / 2, first = scale_index(w, row, 0);
  const i64 stretches = ceil_div(x.blocks, 4);
  const bool centred = Dot::kBase == 8.0f && !w.zeros;
  Vec total[M], apart[M];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) total[m] = apart[m] = zero();
  for (i64 s = 0; s < stretches; ++s) {
    const Vec scales = lanes.of(w.scales, w.scale_type, first, s);
    if (!centred) {
      const Vec zeros = w.zeros ? lanes.of(w.zeros, w.scale_type, first, s) : set1(8.0f);
      const Vec worth = (set1(Dot::kBase) - zeros) * scales;
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
        apart[m] = fma(worth, load(x.held + (m * stretches + s) * W), apart[m]);
    }
    const auto block = [&](int q, IntVec v) INLINE_LAMBDA {
      const Vec scale = lanes.at(scales, q);
      Vec sums[M];
      dot.template block<M>(v, x, 4 * s + q, sums);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) total[m] = fma(sums[m], scale, total[m]);
    };
    const uint8_t* codes = p + s * (kStretch / 2);
    const i64 left = bytes - s * (kStretch / 2);
    if (left >= kStretch / 2) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        __builtin_prefetch((const void*)(uintptr_t(codes + 64 * q) + 2048));
        block(q, load_words(codes + 64 * q));
      }
    } else {
      for (int q = 0; q < 4 && 64 * q < left; ++q)
        block(q, load_codes(codes + 64 * q, left - 64 * q));
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) out[m] = hsum(total[m] + apart[m]) * x.scales[m];
}

INLINE float plain_number(float x) { return x; }
INLINE float plain_number(int8_t x) { return float(x); }
INLINE float plain_number(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float number;
  __builtin_memcpy(&number, &bits, 4);
  return number;
}

// One token of k numbers, dealt out for Dot; held: its groups' sums. False where numbers are not
// finite, or so large that a zero's part, taken away again, would leave a trace.
template <class Dot, class T>
APART bool deal(const T* x, i64 k, i64 blocks, const Lanes& lanes, typename Dot::Token* out,
                float* held) {
  bool small = true;
  for (i64 i = 0; i < ceil_div(blocks, 4) * W; ++i) held[i] = 0.0f;
  for (i64 b = 0; b < blocks; ++b, out += kDealt) {
    T block[kDealt] = {};
    __builtin_memcpy(block, x + b * kDealt, size_t(least(kDealt, k - b * kDealt)) * sizeof(T));
    for (int i = 0; i < W; ++i) {
      float sum = 0;
      for (int j = 0; j < 8; ++j) {
        const T value = block[8 * i + j];
        out[Dot::place(i, j)] = value;
        const float number = plain_number(value), size = number < 0 ? -number : number;
        sum += number;
        small = small && size < 0x1p100f;
      }
      held[b / 4 * W + lanes.spread[b % 4][i]] += sum;
    }
  }
  return small;
}

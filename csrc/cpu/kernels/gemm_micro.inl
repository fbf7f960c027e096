// Microkernels and the engines around them: how an operand is packed, what a tile of the result is.
//
// An engine multiplies panels: [words][rows] of the left side by [words][kCols] of the right one
// into fp32 [rows][kCols].

// Rows and vectors of sums that the registers hold beside what is multiplied.
#if defined(__aarch64__)
constexpr int kMostRows = 8, kVectors = 3;
#else
constexpr int kMostRows = W == 16 ? 14 : W == 8 ? 6 : 4, kVectors = 2;
#endif

struct MultiplyAdd {
  INLINE_MEMBER static Vec step(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};
#if defined(FASTLLM_DOTS)
struct DotPairs {
  INLINE_MEMBER static Vec step(Vec a, Vec b, Vec sum) { return dot_pairs(a, b, sum); }
};
#endif

// Every call sums from zero: blocks of k, added up, round far less than one long chain.
template <int Rows, class Step>
APART void micro(i64 words, const float* a, const float* b, float* c, bool add) {
  Vec sum[Rows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[i][j] = zero();
  for (i64 w = 0; w < words; ++w) {
    Vec right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * W);
    __builtin_prefetch(b + 8 * kVectors * W);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec left = set1(a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] = Step::step(left, right[j], sum[i][j]);
    }
    a += Rows;
    b += kVectors * W;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + (i * kVectors + j) * W;
      store(to, add ? load(to) + sum[i][j] : sum[i][j]);
    }
}

// The microkernel with as many rows as the panel has.
template <class Step, int Rows = kMostRows>
INLINE void micro_of(int rows, i64 words, const float* a, const float* b, float* c, bool add) {
  if (rows == Rows) return micro<Rows, Step>(words, a, b, c, add);
  if constexpr (Rows > 1) micro_of<Step, Rows - 1>(rows, words, a, b, c, add);
}

// Vector engines: T as it lies in memory, Load how it becomes words, Step what a word does.
template <class Load, class Step>
struct Vectors {
  using T = typename Load::Type;
  static constexpr int kCols = kVectors * W, kGroup = Load::kGroup;
  static constexpr i64 kWords = 128;  // of k at a time: short chains, and a right panel stays in L1
  // Panels of equal height: 16 rows are 8 + 8, not 14 + 2.
  static int rows(i64 m) { return int(ceil_div(m, ceil_div(m, kMostRows))); }
  static i64 words(i64 k) { return ceil_div(k, Load::kGroup); }
  static void pack_left(const T* src, i64 row, i64 col, i64 rows, i64 k, i64 words, int width,
                        float* out) {
    pack_panel<Load>(src, row, col, rows, k, words, width, out);
  }
  static void pack_right(const T* src, i64 row, i64 col, i64 rows, i64 k, i64 words, float* out) {
    pack_panel<Load>(src, row, col, rows, k, words, kCols, out);
  }
  struct Session {};
  INLINE_MEMBER static void micro(int rows, i64 words, const float* a, const float* b, float* c,
                                  bool add) {
    micro_of<Step>(rows, words, a, b, c, add);
  }
};

#if defined(FASTLLM_TILES)
// AMX: two by two tiles of 16 x 16 sums, 32 numbers of k a step.
struct Tiles {
  using T = bf16;
  static constexpr int kCols = 32, kGroup = 2;
  static constexpr i64 kWords = 512;
  static int rows(i64 m) { return m <= 16 ? 16 : 32; }
  static i64 words(i64 k) { return ceil_div(k, 32) * 16; }
  static void pack_left(const bf16* src, i64 row, i64 col, i64 rows, i64 k, i64 words, int width,
                        float* out) {
    pack_rows(src, row, col, rows, k, words, width, out);
  }
  static void pack_right(const bf16* src, i64 row, i64 col, i64 rows, i64 k, i64 words,
                         float* out) {
    pack_panel<Pair>(src, row, col, rows, k, words, kCols, out);
  }
  using Session = TileSession;
  INLINE_MEMBER static void micro(int rows, i64 words, const float* a, const float* b, float* c,
                                  bool add) {
    if (rows == 16)
      tiles_1x2(words / 16, a, b, c, add);
    else
      tiles_2x2(words / 16, a, b, c, add);
  }
};
#endif

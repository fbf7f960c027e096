// Packing: panels of `width` rows of an operand, k by k, converted to what the microkernel eats.
//
// A word is 32 bits: one float, or two 16-bit numbers that are neighbours along k. A panel is
// [words][width]; missing rows and the end of k are zeros.

// ---- W x W words, rows for columns

template <int Step, int... J>
INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, J...>) {
  const auto x = a.v, y = b.v;
#if defined(__clang__) || __GNUC__ >= 12
  a.v = __builtin_shufflevector(x, y, ((J & Step) ? W + J - Step : J)...);
  b.v = __builtin_shufflevector(x, y, ((J & Step) ? W + J : J + Step)...);
#else
  typedef int32_t Index __attribute__((vector_size(4 * W)));
  a.v = __builtin_shuffle(x, y, Index{((J & Step) ? W + J - Step : J)...});
  b.v = __builtin_shuffle(x, y, Index{((J & Step) ? W + J : J + Step)...});
#endif
}

template <int Step>
INLINE void transpose_from(Vec (&r)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & Step)) exchange<Step>(r[i], r[i + Step], std::make_integer_sequence<int, W>{});
  if constexpr (2 * Step < W) transpose_from<2 * Step>(r);
}

INLINE void transpose(Vec (&r)[W]) { transpose_from<1>(r); }

// ---- loads of words

// Numbers become floats.
template <class T>
struct Single {
  using Type = T;
  static constexpr int kGroup = 1;
  // n words of one row from word w on; k numbers are left in the row
  INLINE_MEMBER static Vec along(const T* row, i64 w, i64 left, int n) {
    return n == W && left >= W ? load(row + w) : load(row + w, int(least(n, left)));
  }
  // word w of n rows whose numbers are adjacent
  INLINE_MEMBER static Vec across(const T* p, i64, i64, int n) {
    return n == W ? load(p) : load(p, n);
  }
};

#if defined(FASTLLM_DOTS)
// Pairs stay as they are.
struct Pair {
  using Type = bf16;
  static constexpr int kGroup = 2;
  INLINE_MEMBER static Vec along(const bf16* row, i64 w, i64 left, int n) {
    return load_pairs(row + 2 * w, int(least(2 * n, left)));
  }
  INLINE_MEMBER static Vec across(const bf16* p, i64 col, i64 left, int n) {
    return left > 1 ? zip_pairs(p, p + col, n) : zip_pairs(p, n);
  }
};
#endif

// W rows of W words from row r0 and word w on, as vectors along the row.
template <class L>
INLINE void rows_of(const typename L::Type* src, i64 row, i64 r0, i64 rows, i64 w, i64 k,
                    Vec (&out)[W]) {
  const i64 left = k - w * L::kGroup;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    out[i] = r0 + i < rows ? L::along(src + (r0 + i) * row, w, left, W) : zero();
}

// ---- panels

template <class L>
APART void pack_panel(const typename L::Type* src, i64 row, i64 col, i64 rows, i64 k, i64 words,
                      int width, float* out) {
  if (col == 1 && row != 1) {
    for (i64 w = 0; w < words; w += W) {
      const int deep = int(least(W, words - w));
      for (int r = 0; r < width; r += W) {
        Vec block[W];
        rows_of<L>(src, row, r, rows, w, k, block);
        transpose(block);
        const int n = width - r;
        float* to = out + w * width + r;
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          if (i >= deep) break;
          if (n >= W)
            store(to + i * width, block[i]);
          else
            store(to + i * width, block[i], n);
        }
      }
    }
    return;
  }
  for (i64 w = 0; w < words; ++w) {
    const i64 left = k - w * L::kGroup;
    for (int r = 0; r < width; r += W) {
      const int n = int(least(W, rows - r));
      const Vec v = n > 0 && left > 0 ? L::across(src + r + w * L::kGroup * col, col, left, n)
                                      : zero();
      if (width - r >= W)
        store(out + w * width + r, v);
      else
        store(out + w * width + r, v, width - r);
    }
  }
}

#if defined(FASTLLM_TILES)
// For the left side of tiles: [steps of 16 words][width][16 words].
APART void pack_rows(const bf16* src, i64 row, i64 col, i64 rows, i64 k, i64 words, int width,
                     float* out) {
  for (i64 w = 0; w < words; w += W)
    for (int r = 0; r < width; r += W) {
      Vec block[W];
      if (col == 1) {
        rows_of<Pair>(src, row, r, rows, w, k, block);
      } else {
        const int n = int(most(0, least(W, rows - r)));
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          const i64 left = k - 2 * (w + i);
          block[i] = n > 0 && left > 0 ? Pair::across(src + r + 2 * (w + i) * col, col, left, n)
                                       : zero();
        }
        transpose(block);
      }
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(out + w * width + (r + i) * W, block[i]);
    }
}
#endif

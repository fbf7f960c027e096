// Microkernels: rows of words of the weight times a panel [words][cols] of the activations' words,
// as sums [rows][cols], of int32 or fp32.

constexpr int kTileRows = W == 16 ? 8 : 4, kMostVectors = 2;

struct FloatDots {
  using Sum = Vec;
  INLINE_MEMBER static Sum start(const int32_t*, int) { return zero(); }
  INLINE_MEMBER static Sum step(float w, Vec x, Sum sum) { return fma(set1(w), x, sum); }
  INLINE_MEMBER static Vec bits(Sum sum) { return sum; }
  INLINE_MEMBER static Vec add(Vec before, Sum sum) { return before + sum; }
};
#if defined(FASTLLM_DOTS)
struct PairDots : FloatDots {
  INLINE_MEMBER static Sum step(float w, Vec x, Sum sum) { return dot_pairs(set1(w), x, sum); }
};
#endif
struct ShortDots {
  using Sum = IntVec;
  INLINE_MEMBER static Sum start(const int32_t* from, int i) { return IntVec{} + from[i]; }
  INLINE_MEMBER static Sum step(float w, Vec x, Sum sum) {
    return dot_shorts(bits_of(set1(w)), bits_of(x), sum);
  }
  INLINE_MEMBER static Vec bits(Sum sum) { return from_bits(sum); }
  INLINE_MEMBER static Vec add(Vec before, Sum sum) { return from_bits(bits_of(before) + sum); }
};
#if defined(FASTLLM_BYTE_DOTS)
struct ByteDots : ShortDots {
  INLINE_MEMBER static Sum step(float w, Vec x, Sum sum) {
    return dot_bytes(bits_of(x), bits_of(set1(w)), sum);
  }
};
#endif

template <class Step, int V>
INLINE void sum_tile(i64 words, const float* a, i64 stride, const float* x, const int32_t* start,
                     typename Step::Sum (&sum)[kTileRows][V]) {
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) sum[i][j] = Step::start(start, i);
  for (i64 w = 0; w < words; ++w, x += V * W) {
    Vec right[V];
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) right[j] = load(x + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) sum[i][j] = Step::step(a[i * stride + w], right[j], sum[i][j]);
  }
}

// c (+)= the sums; start: what integer sums begin with, row by row.
template <class Step, int V>
APART void micro(i64 words, const float* a, i64 stride, const float* x, const int32_t* start,
                 float* c, bool add) {
  typename Step::Sum sum[kTileRows][V];
  sum_tile<Step, V>(words, a, stride, x, start, sum);
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) {
      float* to = c + (i * V + j) * W;
      store(to, add ? Step::add(load(to), sum[i][j]) : Step::bits(sum[i][j]));
    }
}

// c (+)= scale * sums + shift * totals: one group; scale and shift are by row, totals by column.
template <class Step, int V>
APART void micro_group(i64 words, const float* a, i64 stride, const float* x, const int32_t* start,
                       const float* scale, const float* shift, const float* totals, float* c,
                       bool add) {
  typename Step::Sum sum[kTileRows][V];
  sum_tile<Step, V>(words, a, stride, x, start, sum);
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) {
      float* to = c + (i * V + j) * W;
      Vec value = add ? load(to) : zero();
      if (shift) value = fma(set1(shift[i]), load(totals + j * W), value);
      store(to, fma(set1(scale[i]), to_float(sum[i][j]), value));
    }
}

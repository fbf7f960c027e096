// A few rows by a large matrix: b is read once, where it lies, and the left side sits in the cache.

constexpr i64 kChain = 32;  // terms summed before they join the total: long chains round more

// b's rows are adjacent in k: adds the dot products of R rows of b with M rows of x (fp32, [M][width])
// over k terms, kChain vectors of them at most.
template <int M, int R, class T>
INLINE void dots(const T* b, i64 row, const float* x, i64 width, i64 k, float (&out)[M][R]) {
  Vec sum[M][R];
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) sum[m][r] = zero();
  const auto step = [&](i64 i, auto lanes) INLINE_LAMBDA {
    Vec left[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) left[m] = get(x + m * width + i, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec right = get(b + r * row + i, lanes);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m][r] = fma(left[m], right, sum[m][r]);
    }
  };
  i64 i = 0;
  for (; i + W <= k; i += W) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(b + r * row + i + 1024 / sizeof(T));
    step(i, All{});
  }
  if (i < k) step(i, First{int(k - i)});
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) out[m][r] += hsum(sum[m][r]);
}

template <int M, int R, class T>
INLINE void dot_rows(const T* b, i64 row, const float* x, i64 k, float* out, i64 width) {
  float sums[M][R] = {};
  for (i64 i = 0; i < k; i += kChain * W)
    dots<M, R>(b + i, row, x + i, k, least(kChain * W, k - i), sums);
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) out[m * width + r] = sums[m][r];
}

template <int M, class T>
APART void thin_rows(const T* b, i64 row, const float* x, i64 k, i64 from, i64 to, float* out,
                     i64 width) {
  i64 n = from;
  for (; n + 4 <= to; n += 4) dot_rows<M, 4>(b + n * row, row, x, k, out + n - from, width);
  for (; n < to; ++n) dot_rows<M, 1>(b + n * row, row, x, k, out + n - from, width);
}

// b is adjacent along n: adds terms [i, end) of M x `across` sums to out.
template <int M, class T, class L>
INLINE void add_columns(const T* b, i64 col, const float* x, i64 k, i64 i, i64 end, float* out,
                        i64 width, L lanes) {
  constexpr int kAcross = std::is_same_v<L, All> ? 4 : 1;
  Vec sum[M][kAcross];
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < kAcross; ++j) sum[m][j] = zero();
  for (; i < end; ++i) {
    const T* line = b + i * col;
    __builtin_prefetch(line + 16 * col);
#pragma GCC unroll 4
    for (int j = 0; j < kAcross; ++j) {
      const Vec v = get(line + j * W, lanes);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m][j] = fma(set1(x[m * k + i]), v, sum[m][j]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < kAcross; ++j) {
      float* to = out + m * width + j * W;
      put<false>(to, get(to, lanes) + sum[m][j], lanes);
    }
}

template <int M, class T>
APART void thin_columns(const T* b, i64 col, const float* x, i64 k, i64 from, i64 to, float* out,
                        i64 width) {
  for (int m = 0; m < M; ++m)
    for (i64 n = 0; n < to - from; ++n) out[m * width + n] = 0.0f;
  for (i64 i = 0; i < k; i += kChain) {
    const i64 end = least(k, i + kChain);
    i64 n = from;
    for (; n + 4 * W <= to; n += 4 * W)
      add_columns<M>(b + n, col, x, k, i, end, out + n - from, width, All{});
    for (; n < to; n += W)
      add_columns<M>(b + n, col, x, k, i, end, out + n - from, width,
                     First{int(least(W, to - n))});
  }
}

template <int M, class T>
INLINE void thin_block(const Matrix& b, i64 batch, const float* x, i64 k, i64 from, i64 to,
                       float* out, i64 width) {
  const T* data = (const T*)b.data + batch * b.batch;
  if (b.col == 1)
    thin_rows<M>(data, b.row, x, k, from, to, out, width);
  else
    thin_columns<M>(data, b.col, x, k, from, to, out, width);
}

// m <= kThinRows.
template <class T>
void thin(const Product& p, i64 batch, int threads) {
  constexpr i64 kCols = 64;
  const Scratch scratch(p.m * p.k);
  float* x = scratch.data();
  const T* a = (const T*)p.a.data + batch * p.a.batch;
  for (i64 m = 0; m < p.m; ++m) {
    i64 i = 0;
    if (p.a.col == 1)
      for (; i + W <= p.k; i += W) store(x + m * p.k + i, load(a + m * p.a.row + i));
    for (; i < p.k; ++i) store(x + m * p.k + i, load(a + m * p.a.row + i * p.a.col, 1), 1);
  }
  parallel_for(ceil_div(p.n, kCols), threads, [&](i64 task) {
    alignas(64) float sums[2][kThinRows * kCols];
    const i64 from = task * kCols, to = least(p.n, from + kCols);
    for (int which = 0; which < (p.b2.data ? 2 : 1); ++which) {
      const Matrix& b = which ? p.b2 : p.b;
      float* out = sums[which];
      if (p.m == 1) thin_block<1, T>(b, batch, x, p.k, from, to, out, kCols);
      if (p.m == 2) thin_block<2, T>(b, batch, x, p.k, from, to, out, kCols);
      if (p.m == 3) thin_block<3, T>(b, batch, x, p.k, from, to, out, kCols);
      if (p.m == 4) thin_block<4, T>(b, batch, x, p.k, from, to, out, kCols);
    }
    finish<T>(p, batch, sums[0], p.b2.data ? sums[1] : nullptr, 0, p.m, from, to - from, kCols);
  });
}

// What happens to sums on their way out: scale, bias, activation, the other half of a gated pair,
// residual, accumulation. fp32 throughout, one rounding per tensor written.

#include "cpu/kernels/activate.inl"

// Finishes `n` sums of one row, at column `col`; c2 are those of the second product, or null.
template <class T, class Out, class L>
INLINE void finish_vector(const Product& p, const float* c, const float* c2, i64 at, i64 col,
                          L lanes) {
  Vec z = get(c, lanes) * set1(p.scale);
  if (p.bias) z = z + get((const T*)p.bias + col, lanes);
  if (p.pre) put<false>((T*)p.pre + at, z, lanes);
  if (p.activation) z = activate<false>(p.activation, z).value;
  if (c2) {
    const Vec up = get(c2, lanes);
    if (p.pre2) put<false>((T*)p.pre2 + at, up, lanes);
    z = z * up;
  }
  if (p.residual) z = z + get((const T*)p.residual + at, lanes);
  Out* out = (Out*)p.out + at;
  if (p.accumulate) z = z + get(out, lanes);
  put<false>(out, z, lanes);
}

template <class T, class Out>
INLINE void finish_row(const Product& p, i64 batch, const float* c, const float* c2, i64 row,
                       i64 col, i64 n) {
  const i64 start = batch * p.out_batch + row * p.out_row + col;
  i64 j = 0;
  for (; j + W <= n; j += W)
    finish_vector<T, Out>(p, c + j, c2 ? c2 + j : nullptr, start + j, col + j, All{});
  if (j < n)
    finish_vector<T, Out>(p, c + j, c2 ? c2 + j : nullptr, start + j, col + j, First{int(n - j)});
}

// Rows of a block whose sums lie in panels [height][width].
template <class T, class Out>
APART void finish_panel(const Product& p, i64 batch, const float* c, const float* c2, i64 row,
                        i64 rows, i64 col, i64 cols, i64 width) {
  for (i64 i = 0; i < rows; ++i)
    finish_row<T, Out>(p, batch, c + i * width, c2 ? c2 + i * width : nullptr, row + i, col, cols);
}

template <class T>
INLINE void finish(const Product& p, i64 batch, const float* c, const float* c2, i64 row, i64 rows,
                   i64 col, i64 cols, i64 width) {
  if (p.out_dtype == kFloat32)
    finish_panel<T, float>(p, batch, c, c2, row, rows, col, cols, width);
  else
    finish_panel<T, T>(p, batch, c, c2, row, rows, col, cols, width);
}

// ---- backward, and sums over rows

constexpr i64 kPiece = 8192;

template <class T>
APART void activation_backward_part(const ActivationBackward& a, i64 from, i64 to) {
  for (i64 i = from; i < to;) {
    const auto step = [&](auto lanes) INLINE_LAMBDA {
      const Vec g = get((const T*)a.grad + i, lanes);
      const Point f = activate<true>(a.activation, get((const T*)a.pre + i, lanes));
      Vec dz = g * f.slope;
      if (a.up) {
        dz = dz * get((const T*)a.up + i, lanes);
        Vec dup = g * f.value;
        if (a.more_up) dup = dup + get((const T*)a.more_up + i, lanes);
        put<false>((T*)a.grad_up + i, dup, lanes);
      }
      if (a.more_pre) dz = dz + get((const T*)a.more_pre + i, lanes);
      put<false>((T*)a.grad_pre + i, dz, lanes);
    };
    if (i + W <= to)
      step(All{});
    else
      step(First{int(to - i)});
    i += W;
  }
}

void activation_backward(const ActivationBackward& a) {
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int threads = useful_threads(3 * a.size * i64(sizeof(T)), a.threads);
    parallel_for(ceil_div(a.size, kPiece), threads, [&](i64 task) {
      activation_backward_part<T>(a, task * kPiece, least(a.size, (task + 1) * kPiece));
    });
  });
}

// 16 rows, then 16 such sums, then those: short chains of roundings.
template <class T>
APART void sum_columns(const RowSum& a, i64 col, int n) {
  constexpr i64 kRows = 16;
  Vec total = zero();
  for (i64 outer = 0; outer < a.m; outer += kRows * kRows) {
    Vec middle = zero();
    const i64 end = least(a.m, outer + kRows * kRows);
    for (i64 from = outer; from < end; from += kRows) {
      Vec sum = zero();
      for (i64 i = from; i < least(end, from + kRows); ++i) {
        const T* x = (const T*)a.x + i * a.n + col;
        sum = sum + (n == W ? load(x) : load(x, n));
      }
      middle = middle + sum;
    }
    total = total + middle;
  }
  if (n == W)
    store((T*)a.sums + col, total);
  else
    store((T*)a.sums + col, total, n);
}

void row_sum(const RowSum& a) {
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int threads = useful_threads(a.m * a.n * i64(sizeof(T)), a.threads);
    parallel_for(ceil_div(a.n, W), threads, [&](i64 task) {
      sum_columns<T>(a, task * W, int(least(W, a.n - task * W)));
    });
  });
}

// Adafactor's two passes over a gradient: sums of squares by row and by column, and the gradient over
// the root of their product.

// Rows are dealt out in blocks that do not depend on the number of threads, nor do the sums.
INLINE i64 factored_tasks(const Factored& a) {
  return least(least(most(1, a.rows * a.cols / kPiece), 64), most(1, a.rows));
}
template <class F>
INLINE void each_rows(const Factored& a, const F& body) {
  const i64 tasks = factored_tasks(a), share = ceil_div(a.rows, tasks);
  const int threads = useful_threads(a.rows * a.cols * 4, a.threads);
  parallel_for(tasks, threads, [&](i64 task) {
    body(task, least(a.rows, task * share), least(a.rows, (task + 1) * share));
  });
}

void factor_squares(const Factored& a) {
  const i64 tasks = factored_tasks(a);
  const Scratch scratch(tasks * a.cols);
  each_rows(a, [&](i64 task, i64 from, i64 to) {
    float* sums = scratch.data() + task * a.cols;
    for (i64 j = 0; j < a.cols; ++j) sums[j] = 0.0f;
    with_type(a.type, [&](auto* type) {
      const auto* g = static_cast<decltype(type)>(const_cast<void*>(a.grad)) + from * a.cols;
      for (i64 i = from; i < to; ++i, g += a.cols) {
        Vec acc[4] = {zero(), zero(), zero(), zero()};
        sweep(a.cols, [&](auto lanes, i64 j, int k) INLINE_LAMBDA {
          const Vec v = get(g + j, lanes), squared = v * v;
          acc[k] = acc[k] + squared;
          put<false>(sums + j, get(sums + j, lanes) + squared, lanes);
        });
        a.by_row[i] = total(acc);
      }
    });
  });
  for (i64 j = 0; j < a.cols; ++j) {
    float sum = 0.0f;
    for (i64 task = 0; task < tasks; ++task) sum += scratch.data()[task * a.cols + j];
    a.by_col[j] = sum;
  }
}

// out = factor g / sqrt(max(by_row x by_col, floor)); returns the sum of its squares.
double factor_direction(const Factored& a) {
  const i64 tasks = factored_tasks(a);
  const Scratch scratch(2 * tasks);
  double* parts = reinterpret_cast<double*>(scratch.data());
  const Vec floor = set1(a.floor), factor = set1(a.factor);
  each_rows(a, [&](i64 task, i64 from, i64 to) {
    parts[task] = 0;
    with_type(a.type, [&](auto* type) {
      const auto* g = static_cast<decltype(type)>(const_cast<void*>(a.grad)) + from * a.cols;
      for (i64 i = from; i < to; ++i, g += a.cols) {
        const Vec row = set1(a.by_row[i]);
        float* out = a.out + i * a.cols;
        Vec acc[4] = {zero(), zero(), zero(), zero()};
        sweep(a.cols, [&](auto lanes, i64 j, int k) INLINE_LAMBDA {
          const Vec product = row * get(a.by_col + j, lanes);
          // NaN goes on
          const Vec square = {product.v < floor.v ? floor.v : product.v};
          const Vec u = quotient(get(g + j, lanes) * factor, root(square));
          acc[k] = fma(only(u, lanes), only(u, lanes), acc[k]);
          put<false>(out + j, u, lanes);
        });
        parts[task] += total(acc);
      }
    });
  });
  double sum = 0;
  for (i64 task = 0; task < tasks; ++task) sum += parts[task];
  return sum;
}

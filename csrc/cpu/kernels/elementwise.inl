// What kernels without sums over a row share: loops over parts of the data, and how they write.
#pragma once

// From this many bytes on, an output is written past the caches: it would not stay there.
constexpr i64 kPastCaches = 4 << 20;

INLINE bool lined_up(const void* p) { return (uintptr_t)p % 64 == 0; }

// Calls step(lanes, offset) over [0, n).
template <class F>
INLINE void each(i64 n, const F& step) {
  i64 i = 0;
  for (; i + W <= n; i += W) step(All{}, i);
  if (i < n) step(First{int(n - i)}, i);
}

template <class L, class T>
INLINE void write(bool past_caches, T* p, Vec v, L lanes) {
  if (past_caches)
    put<true>(p, v, lanes);
  else
    put<false>(p, v, lanes);
}

// Calls piece(row, column, count) for parts of the rows, on threads. A part is a multiple of 64
// columns from the next one.
template <class F>
INLINE void by_parts(i64 rows, i64 cols, i64 bytes, int threads, const F& piece) {
  constexpr i64 kPart = 8192;
  if (rows == 0 || cols == 0) return;
  const i64 across = ceil_div(cols, kPart), parts = rows * across;
  const i64 step = most(most(1, kPart / cols), ceil_div(parts, 16 * i64(threads)));
  const int workers = useful_threads(bytes, threads);
  const i64 stride = workers == 1 ? parts : step;
  parallel_for(ceil_div(parts, stride), workers, [&](i64 task) {
    const i64 end = least(parts, (task + 1) * stride);
    for (i64 part = task * stride; part < end; ++part) {
      const i64 from = part % across * kPart;
      piece(part / across, from, least(kPart, cols - from));
    }
    stream_fence();
  });
}

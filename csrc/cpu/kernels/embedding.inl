// Embedding: rows gathered; backward sums the rows of each index in their order, in fp32, so that
// the result does not depend on threads.
#include "cpu/kernels/elementwise.inl"

INLINE i64 index_at(const void* p, int wide, i64 i) {
  return wide ? ((const int64_t*)p)[i] : ((const int32_t*)p)[i];
}

// Copies n words past the caches, to whole cache lines.
INLINE void copy_past(const float* from, float* to, i64 n) {
  each(n, [&](auto lanes, i64 i) INLINE_LAMBDA { put<true>(to + i, get(from + i, lanes), lanes); });
}

void gather(const Gather& a) {
  if (a.count == 0 || a.row_bytes == 0) return;
  const i64 bytes = a.count * a.row_bytes;
  const int threads = useful_threads(bytes, a.threads);
  const i64 share = least(ceil_div(a.count, threads), ceil_div(65536, a.row_bytes));
  const i64 step = threads == 1 ? a.count : share;
  const bool past = bytes >= kPastCaches && lined_up(a.output) && a.row_bytes % 64 == 0;
  const auto row = [&](i64 i) INLINE_LAMBDA {
    return (const char*)a.weight + index_at(a.input, a.wide, i) * a.weight_step;
  };
  parallel_for(ceil_div(a.count, step), threads, [&](i64 task) {
    const i64 end = least(a.count, (task + 1) * step);
    for (i64 i = task * step; i < end; ++i) {
      const char *from = row(i), *next = row(least(i + 1, end - 1));
      char* to = (char*)a.output + i * a.row_bytes;
      for (i64 j = 0; j < least(a.row_bytes, 4096); j += 64) __builtin_prefetch(next + j);
      if (past)
        copy_past((const float*)from, (float*)to, a.row_bytes / 4);
      else
        __builtin_memcpy(to, from, uint64_t(a.row_bytes));
    }
    stream_fence();
  });
}

// Counting sort: ends[r] becomes the end in `order` of the places where index r stands, ascending.
APART void sort_places(const Scatter& a, i64* ends, i64* order) {
  __builtin_memset(ends, 0, uint64_t(a.rows + 1) * sizeof(i64));
  const auto counted = [&](i64 r) { return r >= 0 && r < a.rows && r != a.padding_idx; };
  for (i64 i = 0; i < a.count; ++i) {
    const i64 r = index_at(a.input, a.wide, i);
    if (counted(r)) ++ends[r + 1];
  }
  for (i64 r = 0; r < a.rows; ++r) ends[r + 1] += ends[r];
  for (i64 i = 0; i < a.count; ++i) {
    const i64 r = index_at(a.input, a.wide, i);
    if (counted(r)) order[ends[r]++] = i;
  }
}

// Columns [from, from + n) of one row of the gradient.
template <class T>
APART void sum_row(const Scatter& a, const i64* order, i64 places, i64 row, i64 from, i64 n,
                   bool past_caches) {
  const T* dy = (const T*)a.grad_output + from;
  T* dw = (T*)a.grad_weight + row * a.cols + from;
  const Vec scale = set1(a.scale_grad_by_freq && places ? 1.0f / float(places) : 1.0f);
  each(n, [&](auto lanes, i64 i) INLINE_LAMBDA {
    Vec sum = zero();
    for (i64 k = 0; k < places; ++k) sum = sum + get(dy + order[k] * a.cols + i, lanes);
    write(past_caches, dw + i, sum * scale, lanes);
  });
}

void scatter(const Scatter& a) {
  if (a.rows == 0 || a.cols == 0) return;
  i64 *ends = (i64*)a.room, *order = ends + a.rows + 1;
  sort_places(a, ends, order);
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr i64 kCols = 512;  // a frequent index is shared out by columns
    const i64 across = ceil_div(a.cols, kCols), bytes = a.rows * a.cols * i64(sizeof(T));
    const bool stream =
        bytes >= kPastCaches && lined_up(a.grad_weight) && a.cols * sizeof(T) % 64 == 0;
    const int threads = useful_threads(bytes, a.threads);
    const i64 step = most(1, least(64, ceil_div(a.rows, 4 * i64(threads))));
    parallel_for(ceil_div(a.rows, step) * across, threads, [&](i64 task) {
      const i64 first = task / across * step, from = task % across * kCols;
      for (i64 row = first; row < least(a.rows, first + step); ++row) {
        const i64 begin = row ? ends[row - 1] : 0;
        sum_row<T>(a, order + begin, ends[row] - begin, row, from, least(kCols, a.cols - from),
                   stream);
      }
      stream_fence();
    });
  });
}

constexpr Kernels table = {gather, scatter};

// Rotary position embedding (Su et al. 2021): y[i] = x[i] c[i] + x[partner of i] s[i], in fp32.
#include "cpu/kernels/elementwise.inl"

// n values of a table, times `sign`.
APART void table_values(const void* p, int dtype, i64 from, i64 n, float sign, float* out) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* table = (const T*)p + from;
    each(n, [&](auto lanes, i64 i)
                INLINE_LAMBDA { put<false>(out + i, get(table + i, lanes) * set1(sign), lanes); });
  });
}

// The factors of one row: c for the element itself, s, with its sign, for its partner. The gradient
// takes the sine of the row that the partner was written to. `room` holds two rows of a table.
APART void factors(const Rotate& a, i64 batch, i64 row, float* c, float* s, float* room) {
  const i64 n = a.rotary_dim, half = n / 2, at = batch * a.table_batch + row * a.width;
  const bool narrow = a.width < n;
  const float sign = a.transposed ? 1.0f : -1.0f;  // of the first of two partners
  if (!a.interleaved) {
    const i64 second = narrow ? 0 : half;  // where the tables have the second half
    table_values(a.cos, a.table_dtype, at, half, 1.0f, c);
    table_values(a.cos, a.table_dtype, at + second, half, 1.0f, c + half);
    table_values(a.sin, a.table_dtype, at + (a.transposed ? second : 0), half, sign, s);
    table_values(a.sin, a.table_dtype, at + (a.transposed ? 0 : second), half, -sign, s + half);
    return;
  }
  float *cosines = room, *sines = room + a.width;
  table_values(a.cos, a.table_dtype, at, a.width, 1.0f, cosines);
  table_values(a.sin, a.table_dtype, at, a.width, sign, sines);
  for (i64 i = 0; i < half; ++i) {
    const i64 first = narrow ? i : 2 * i, second = narrow ? i : 2 * i + 1;
    c[2 * i] = cosines[first];
    c[2 * i + 1] = cosines[second];
    s[2 * i] = sines[a.transposed ? second : first];
    s[2 * i + 1] = -sines[a.transposed ? first : second];
  }
}

template <bool Interleaved, class T>
APART void rotate_row(const T* x, T* y, const float* c, const float* s, i64 n, i64 dim,
                      bool past_caches) {
  const i64 half = n / 2;
  if (Interleaved)
    each(n, [&](auto lanes, i64 i) INLINE_LAMBDA {
      const Vec v = get(x + i, lanes);
      const Vec turned = swap_pairs(v) * get(s + i, lanes);
      write(past_caches, y + i, fma(v, get(c + i, lanes), turned), lanes);
    });
  else
    each(half, [&](auto lanes, i64 i) INLINE_LAMBDA {
      const Vec first = get(x + i, lanes), second = get(x + half + i, lanes);
      const Vec low = fma(first, get(c + i, lanes), second * get(s + i, lanes));
      const Vec high = fma(second, get(c + half + i, lanes), first * get(s + half + i, lanes));
      write(past_caches, y + i, low, lanes);
      write(past_caches, y + half + i, high, lanes);
    });
  if (x != y)
    each(dim - n, [&](auto lanes, i64 i)
                      INLINE_LAMBDA { write(false, y + n + i, get(x + n + i, lanes), lanes); });
}

template <bool Interleaved, class T>
APART void rotate_rows(const Rotate& a, i64 batch, i64 from, i64 to, bool past_caches) {
  const i64 n = a.rotary_dim, rows = to - from;
  const Scratch scratch(2 * n * rows + 2 * a.width);
  float *c = scratch.data(), *s = c + n * rows, *room = s + n * rows;
  for (i64 r = 0; r < rows; ++r) factors(a, batch, from + r, c + r * n, s + r * n, room);
  const T* x = (const T*)a.input + batch * a.in_batch + from * a.in_row;
  T* y = (T*)a.output + batch * a.out_batch + from * a.out_row;
  const auto one = [&](i64 head, i64 r) INLINE_LAMBDA {
    rotate_row<Interleaved>(x + head * a.in_head + r * a.in_row,
                            y + head * a.out_head + r * a.out_row, c + r * n, s + r * n, n, a.dim,
                            past_caches);
  };
  // the order in which the input lies
  if (a.in_head < a.in_row)
    for (i64 r = 0; r < rows; ++r)
      for (i64 head = 0; head < a.heads; ++head) one(head, r);
  else
    for (i64 head = 0; head < a.heads; ++head)
      for (i64 r = 0; r < rows; ++r) one(head, r);
  stream_fence();
}

void rotate(const Rotate& a) {
  if (a.batch == 0 || a.heads == 0 || a.length == 0 || a.dim == 0) return;
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const i64 size = sizeof(T), bytes = a.batch * a.heads * a.length * a.dim * size;
    const bool stream = a.input != a.output && bytes >= kPastCaches && lined_up(a.output) &&
                        a.out_row * size % 64 == 0 && a.out_head * size % 64 == 0 &&
                        a.rotary_dim / 2 * size % 64 == 0 && a.dim == a.rotary_dim;
    const int threads = useful_threads(bytes, a.threads);
    const i64 step = threads == 1 ? 16 : most(1, least(16, ceil_div(a.batch * a.length, threads)));
    const i64 blocks = ceil_div(a.length, step);
    parallel_for(a.batch * blocks, threads, [&](i64 task) {
      const i64 batch = task / blocks, from = task % blocks * step;
      const i64 to = least(a.length, from + step);
      if (a.interleaved)
        rotate_rows<true, T>(a, batch, from, to, stream);
      else
        rotate_rows<false, T>(a, batch, from, to, stream);
    });
  });
}

constexpr Kernels table = {rotate};

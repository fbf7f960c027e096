// Rotary position embedding (Su et al. 2021): y[i] = x[i] c[i] + x[partner of i] s[i], in fp32.
#include "cpu/kernels/elementwise.inl"

INLINE float table_value(const void* p, int dtype, i64 i) {
  float out[W] = {0};
  if (dtype == kFloat32) return ((const float*)p)[i];
  if (dtype == kBFloat16) store(out, load((const bf16*)p + i, 1));
  if (dtype == kFloat16) store(out, load((const f16*)p + i, 1));
  return out[0];
}

// The factors of one row: c for the element itself, s, with its sign, for its partner.
APART void factors(const Rotate& a, i64 batch, i64 row, float* c, float* s) {
  const i64 n = a.rotary_dim, half = n / 2, at = batch * a.table_batch + row * a.width;
  for (i64 i = 0; i < n; ++i) {
    const bool second = a.interleaved ? i % 2 == 1 : i >= half;
    const i64 pair = a.interleaved ? i / 2 : i - second * half;
    const i64 partner = a.interleaved ? i ^ 1 : second ? i - half : i + half;
    // the gradient takes the sine of the row that the partner was written to
    const i64 sine = a.width < n ? pair : a.transposed ? partner : i;
    c[i] = table_value(a.cos, a.table_dtype, at + (a.width < n ? pair : i));
    const float value = table_value(a.sin, a.table_dtype, at + sine);
    s[i] = second != bool(a.transposed) ? value : -value;
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
  const Scratch scratch(2 * n * rows);
  float *c = scratch.data(), *s = c + n * rows;
  for (i64 r = 0; r < rows; ++r) factors(a, batch, from + r, c + r * n, s + r * n);
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

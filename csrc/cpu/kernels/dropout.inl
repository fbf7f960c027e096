// residual + dropout(input), and its backward: the mask is made again instead of being read.
#include "cpu/kernels/elementwise.inl"
#include "cpu/kernels/keep.inl"

constexpr i64 kRow = 1 << 15;  // elements that share a row of the mask, and whose places are a column's

template <bool Add, class T>
APART void part(const T* x, const T* r, T* y, i64 n, const Keep& keep, Words row, Words other,
                i64 column, bool past_caches) {
  each(n, [&](auto lanes, i64 i) INLINE_LAMBDA {
    const Vec factor = keep(row, other, column + i);
    const Vec v = get(x + i, lanes);
    write(past_caches, y + i, Add ? fma(v, factor, get(r + i, lanes)) : v * factor, lanes);
  });
}

void apply(const Call& c) {
  const Keep keep(c.p);
  const uint32_t a = mixed(uint32_t(c.seed)), b = mixed(uint32_t(uint64_t(c.seed) >> 32) ^ a);
  Words lane;
  for (int l = 0; l < W; ++l) lane[l] = kStep * uint32_t(l);
  with_type(c.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const i64 bytes = c.n * i64(sizeof(T));
    const bool stream = bytes >= kPastCaches && lined_up(c.output);
    by_parts(1, c.n, bytes, c.threads, [&](i64, i64 at, i64 n) {
      const uint32_t row = mixed(a + kStep * uint32_t(at / kRow));
      const Words rows = row + lane, others = Words{} + mixed(b ^ row);
      const T *x = (const T*)c.input + at, *r = (const T*)c.residual + at;
      T* y = (T*)c.output + at;
      if (c.residual)
        part<true>(x, r, y, n, keep, rows, others, at % kRow, stream);
      else
        part<false>(x, x, y, n, keep, rows, others, at % kRow, stream);
    });
  });
}

constexpr Kernels table = {apply};

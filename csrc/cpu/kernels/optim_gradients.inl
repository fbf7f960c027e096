// What is done to gradients before a step: their squares, their largest magnitude, scaling in place.

// Sums of this many squares run in fp32, their sums in double; both in an order of their own.
constexpr i64 kSummed = 8192;

struct Measured {
  double squares;
  uint32_t largest;  // the bits of the largest magnitude: NaN above inf above all others
};

template <class T>
APART Measured measured(const T* x, i64 n) {
  Vec acc[4] = {zero(), zero(), zero(), zero()};
  Words top[4] = {words(0), words(0), words(0), words(0)};
  sweep(n, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
    const Vec v = get(x + i, lanes);
    const Words bits = magnitude(v);
    top[k] = pick_words((Words)(bits > top[k]), bits, top[k]);
    acc[k] = fma(v, v, acc[k]);
  });
  Measured out{total(acc), 0};
  for (int k = 0; k < 4; ++k)
    for (int l = 0; l < W; ++l) out.largest = top[k][l] > out.largest ? top[k][l] : out.largest;
  if (out.largest < 0x7f800000u && !(out.squares < 3.0e38)) {  // squares beyond fp32
    out.squares = 0;
    for (i64 i = 0; i < n; i += W) {
      float lane[W];
      store(lane, load(x + i, int(least(W, n - i))));
      for (int l = 0; l < W; ++l) out.squares += double(lane[l]) * double(lane[l]);
    }
  }
  return out;
}

void measure(const Gradients& a) {
  i64 units = 0;
  for (i64 i = 0; i < a.count; ++i) units += ceil_div(a.tensors[i].n, kSummed);
  const Scratch scratch(4 * units + 2 * a.count);
  Measured* parts = reinterpret_cast<Measured*>(scratch.data());
  i64* first = reinterpret_cast<i64*>(parts + units);
  for (i64 i = 0, at = 0; i < a.count; at += ceil_div(a.tensors[i].n, kSummed), ++i) first[i] = at;
  each_piece(a.tensors, a.count, kSummed, 4, a.threads, [&](i64 i, i64 from, i64 to) {
    with_type(a.tensors[i].type, [&](auto* type) {
      const auto* x = static_cast<decltype(type)>(a.tensors[i].data);
      for (i64 at = from; at < to; at += kSummed)
        parts[first[i] + at / kSummed] = measured(x + at, least(kSummed, to - at));
    });
  });
  for (i64 i = 0; i < a.count; ++i) {
    const i64 end = first[i] + ceil_div(a.tensors[i].n, kSummed);
    uint32_t largest = 0;
    a.squares[i] = 0;
    for (i64 k = first[i]; k < end; ++k) {
      a.squares[i] += parts[k].squares;
      largest = parts[k].largest > largest ? parts[k].largest : largest;
    }
    __builtin_memcpy(&a.largest[i], &largest, 4);
  }
}

void scale(const Gradients& a) {
  const Vec factor = set1(a.factor);
  each_piece(a.tensors, a.count, kRoom, 8, a.threads, [&](i64 i, i64 from, i64 to) {
    with_type(a.tensors[i].type, [&](auto* type) {
      auto* x = static_cast<decltype(type)>(a.tensors[i].data) + from;
      sweep(to - from, [&](auto lanes, i64 k, int)
                           INLINE_LAMBDA { put<false>(x + k, get(x + k, lanes) * factor, lanes); });
    });
  });
}

// What the families share, written against the vector vocabulary of the level that includes it.

using i64 = int64_t;

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 most(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// Which lanes of a vector a step touches: all, or the first n.
struct All {};
struct First {
  int n;
};
template <class T>
INLINE Vec get(const T* p, All) {
  return load(p);
}
template <class T>
INLINE Vec get(const T* p, First lanes) {
  return load(p, lanes.n);
}
template <bool Stream, class T>
INLINE void put(T* p, Vec a, All) {
  if (Stream)
    stream(p, a);
  else
    store(p, a);
}
template <bool Stream, class T>
INLINE void put(T* p, Vec a, First lanes) {
  store(p, a, lanes.n);
}

// put, where the level's own rounding to bf16 will do: it makes 0 of subnormal numbers.
template <bool Stream, class T, class L>
INLINE void put_quick(T* p, Vec a, L lanes) {
  put<Stream>(p, a, lanes);
}
#if FASTLLM_ROUNDS
template <bool Stream>
INLINE void put_quick(bf16* p, Vec a, All) {
  if (Stream)
    stream_quick(p, a);
  else
    store_quick(p, a);
}
#endif

// The touched lanes of a, zero in the others.
INLINE Vec only(Vec a, All) { return a; }
INLINE Vec only(Vec a, First lanes) { return keep(a, lanes.n); }

// Calls step(lanes, offset, k) over [0, n): k in 0..3 names one of four independent accumulators.
template <class F>
INLINE void sweep(i64 n, const F& step) {
  i64 i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    step(All{}, i, 0);
    step(All{}, i + W, 1);
    step(All{}, i + 2 * W, 2);
    step(All{}, i + 3 * W, 3);
  }
  for (; i + W <= n; i += W) step(All{}, i, 0);
  if (i < n) step(First{int(n - i)}, i, 1);
}

INLINE Vec merged(const Vec (&acc)[4]) { return (acc[0] + acc[1]) + (acc[2] + acc[3]); }
INLINE float total(const Vec (&acc)[4]) { return hsum(merged(acc)); }

// Asks for the cache line `ahead` elements on, once a line. Only a hint: any address is safe.
template <class T>
INLINE void prefetch(const T* p, i64 ahead, int k) {
  if (k * W * int(sizeof(T)) % 64 == 0) __builtin_prefetch((const char*)p + ahead * i64(sizeof(T)));
}

// How far ahead the next row lies, where it is short enough to wait in the cache while this one is
// written.
template <class T>
INLINE i64 reach(i64 n) {
  return n * i64(sizeof(T)) <= (256 << 10) ? n : 0;
}

// Sums run in fp32 over blocks of this many elements and in double over the blocks: long rows stay
// exact, short ones pay nothing. With four sums of W lanes, each takes 64 terms of a block.
constexpr i64 kBlock = 256 * W;

// One input element: x, or x + r rounded to its type, so that fused and unfused agree bit for bit.
template <bool Add, class T, class L>
INLINE Vec value(const T* x, const T* r, i64 i, L lanes) {
  const Vec a = get(x + i, lanes);
  return Add ? rounded(x, a + get(r + i, lanes)) : a;
}

template <bool Add, class T>
APART double sum_squares(const T* x, const T* r, i64 n) {
  double sum = 0;
  for (i64 at = 0; at < n; at += kBlock) {
    Vec acc[4] = {zero(), zero(), zero(), zero()};
    sweep(least(kBlock, n - at), [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
      const Vec v = value<Add>(x, r, at + i, lanes);
      acc[k] = fma(v, v, acc[k]);
    });
    sum += total(acc);
  }
  return sum;
}

struct Moments {
  double mean, variance;
};

// Mean and sum of squared deviations of the blocks so far, by Chan's formula.
struct Merge {
  double mean = 0, m2 = 0, count = 0;

  // A block of `size` elements: the sums of (x - guess) and (x - guess)^2. The guess is the block's
  // mean but for rounding.
  INLINE_MEMBER void add(float guess, float dev, float sq, i64 size, double inverse_size) {
    const double n = double(size), off = double(dev) * inverse_size;
    const double here = double(guess) + off, here_m2 = double(sq) - off * double(dev);
    if (count == 0) {
      mean = here;
      m2 = here_m2;
    } else {
      const double share = n / (count + n), delta = here - mean;
      mean += delta * share;
      m2 += here_m2 + delta * delta * count * share;
    }
    count += n;
  }
  // 1 / count is the caller's: it knows it for all rows
  INLINE_MEMBER double variance(double inverse) const { return m2 < 0 ? 0.0 : m2 * inverse; }
};

template <bool Add, class T>
INLINE float block_sum(const T* x, const T* r, i64 n) {
  Vec acc[4] = {zero(), zero(), zero(), zero()};
  sweep(n, [&](auto lanes, i64 i, int k)
               INLINE_LAMBDA { acc[k] = acc[k] + value<Add>(x, r, i, lanes); });
  return total(acc);
}

// Two passes a block, with the first mean's rounding error corrected, then Chan's merge of the
// blocks: exact even where the mean is far larger than the deviation, and one read of memory
// however long the row.
template <bool Add, class T>
APART Moments moments(const T* x, const T* r, i64 n, double inverse) {
  Merge blocks;
  for (i64 at = 0; at < n; at += kBlock) {
    const i64 size = least(kBlock, n - at);
    const double inverse_size = size == n ? inverse : 1.0 / double(size);
    const float guess = block_sum<Add>(x + at, Add ? r + at : r, size) * float(inverse_size);
    const Vec shift = set1(guess);
    Vec dev[4] = {zero(), zero(), zero(), zero()}, sq[4] = {zero(), zero(), zero(), zero()};
    sweep(size, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
      const Vec d = only(value<Add>(x, r, at + i, lanes) - shift, lanes);
      dev[k] = dev[k] + d;
      sq[k] = fma(d, d, sq[k]);
    });
    blocks.add(guess, total(dev), total(sq), size, inverse_size);
  }
  return {blocks.mean, blocks.variance(inverse)};
}

// weight + offset (or `missing` where there is none) as n floats: the caller's own memory when that
// is what it is.
APART const float* prepared(const void* p, int dtype, i64 n, float offset, float missing,
                            float* room) {
  if (p && dtype == kFloat32 && offset == 0.0f) return static_cast<const float*>(p);
  const Vec add = set1(p ? offset : missing);
  sweep(n, [&](auto lanes, i64 i, int) INLINE_LAMBDA {
    Vec v = add;
    if (p && dtype == kFloat32) v = v + get(static_cast<const float*>(p) + i, lanes);
    if (p && dtype == kBFloat16) v = v + get(static_cast<const bf16*>(p) + i, lanes);
    if (p && dtype == kFloat16) v = v + get(static_cast<const f16*>(p) + i, lanes);
    put<false>(room + i, v, lanes);
  });
  return room;
}

// Writes n floats rounded to the given type.
INLINE void write_as(int dtype, void* out, i64 at, Vec v, All) {
  if (dtype == kFloat32) store(static_cast<float*>(out) + at, v);
  if (dtype == kBFloat16) store(static_cast<bf16*>(out) + at, v);
  if (dtype == kFloat16) store(static_cast<f16*>(out) + at, v);
}
INLINE void write_as(int dtype, void* out, i64 at, Vec v, First lanes) {
  if (dtype == kFloat32) store(static_cast<float*>(out) + at, v, lanes.n);
  if (dtype == kBFloat16) store(static_cast<bf16*>(out) + at, v, lanes.n);
  if (dtype == kFloat16) store(static_cast<f16*>(out) + at, v, lanes.n);
}

// `count` parts, each of `kinds` rows of cols floats: sums the parts in their order, whatever the
// threads, into first (kind 0) and second (kind 1), where these are not null.
APART void reduce_parts(const float* parts, i64 count, i64 cols, int dtype, void* first,
                        void* second, int kinds, int threads) {
  constexpr i64 kCols = 256;
  const i64 stride = kinds * cols, tasks = ceil_div(cols, kCols);
  parallel_for(kinds * tasks, useful_threads(count * stride * 2, threads), [&](i64 task) {
    const i64 kind = task / tasks, from = task % tasks * kCols;
    void* out = kind == 0 ? first : second;
    if (!out) return;
    const float* column = parts + kind * cols + from;
    sweep(least(kCols, cols - from), [&](auto lanes, i64 i, int) INLINE_LAMBDA {
      Vec sum = zero();
      for (i64 at = 0; at < count; at += 8) {  // in eights: no long chain of roundings
        Vec run = zero();
        for (i64 part = at; part < least(count, at + 8); ++part)
          run = run + get(column + part * stride + i, lanes);
        sum = sum + run;
      }
      write_as(dtype, out, from + i, sum, lanes);
    });
  });
}

template <class F>
INLINE void with_type(int dtype, const F& call) {
  if (dtype == kFloat32) call(static_cast<float*>(nullptr));
  if (dtype == kBFloat16) call(static_cast<bf16*>(nullptr));
  if (dtype == kFloat16) call(static_cast<f16*>(nullptr));
}

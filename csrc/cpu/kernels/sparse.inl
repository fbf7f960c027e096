// Linear layers that keep two of every four weights: half of the numbers are read, put back into
// their places in registers, and meet the tokens there.
#include FASTLLM_KEPT
#include FASTLLM_WORDS
#if defined(FASTLLM_DOTS)
#include "cpu/simd/words_vnni.h"
#endif

constexpr i64 kTokens = 4, kRows = 16;  // at once; rows of the weight a task
constexpr i64 kChain = 32;    // vectors summed before they join the total: long chains round more
constexpr i64 kUnit = 64;     // tokens are padded to a multiple of this
constexpr i64 kAhead = 2048;  // bytes of a row that are asked for early
constexpr i64 kLongestInt32 = 1 << 16;  // terms of 255 * 127 that int32 holds

INLINE i64 kept_count(i64 k) { return 2 * ceil_div(k, 4); }

// The bits of elements [i, i + W).
INLINE unsigned kept_bits(const uint8_t* kept, i64 i) {
  if (W == 16) return unsigned(kept[i / 8]) | unsigned(kept[i / 8 + 1]) << 8;
  return W == 8 ? kept[i / 8] : unsigned(kept[i / 8]) >> (i & 4) & 15u;
}

// step(w, i) for every W elements of a row, those past its end zero; the row's last ones are copied,
// so that nothing behind it is read.
template <class T, class F>
INLINE void each_vector(const T* values, const uint8_t* kept, i64 k, const F& step) {
  i64 i = 0;
  for (; i + 2 * W <= k; i += 2 * W) {
    __builtin_prefetch((const void*)(uintptr_t(values + i / 2) + kAhead));
    step(expand(values + i / 2, kept_bits(kept, i)), i, 0);
    step(expand(values + i / 2 + W / 2, kept_bits(kept, i + W)), i + W, 1);
  }
  if (i == k) return;
  T last[W] = {};
  uint8_t bits[W / 4] = {};
  __builtin_memcpy(last, values + i / 2, kept_count(k - i) * sizeof(T));
  __builtin_memcpy(bits, kept + i / 8, ceil_div(k - i, 8));
  step(expand(last, kept_bits(bits, 0)), i, 0);
  if (i + W < k) step(expand(last + W / 2, kept_bits(bits, W)), i + W, 1);
}

// out[M] = one row times M tokens of `width` floats.
template <int M, class T>
APART void dot_row(const T* values, const uint8_t* kept, i64 k, const float* x, i64 width,
                   float* out) {
  Vec total[M];
  for (int m = 0; m < M; ++m) total[m] = zero();
  for (i64 from = 0; from < k; from += 2 * kChain * W) {
    Vec sum[M][2];
    for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = zero();
    each_vector(values + from / 2, kept + from / 8, least(k - from, 2 * kChain * W),
                [&](Vec w, i64 i, int chain) INLINE_LAMBDA {
#pragma GCC unroll 4
                  for (int m = 0; m < M; ++m)
                    sum[m][chain] = fma(w, load(x + m * width + from + i), sum[m][chain]);
                });
    for (int m = 0; m < M; ++m) total[m] = total[m] + (sum[m][0] + sum[m][1]);
  }
  for (int m = 0; m < M; ++m) out[m] = hsum(total[m]);
}

#if defined(FASTLLM_DOTS)
// The same of codes, exact: x holds them with 128 added, which the row's sum takes away again.
template <int M>
APART void dot_codes(const int8_t* values, const uint8_t* kept, i64 k, const uint8_t* x, i64 width,
                     float* out) {
  const __m512i places = byte_places();
  const IntVec ones = IntVec{} + 0x01010101;
  IntVec sum[M] = {}, own = {};
  const auto step = [&](const int8_t* v, const uint8_t* bits, i64 i) INLINE_LAMBDA {
    const IntVec w = (IntVec)expand_bytes(v, bits, places);
    own = dot_bytes(ones, w, own);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sum[m] = dot_bytes(load_words(x + m * width + i), w, sum[m]);
  };
  i64 i = 0;
  for (; i + 64 <= k; i += 64) {
    __builtin_prefetch((const void*)(uintptr_t(values + i / 2) + kAhead));
    step(values + i / 2, kept + i / 8, i);
  }
  if (i < k) {
    int8_t last[32] = {};
    uint8_t bits[8] = {};
    __builtin_memcpy(last, values + i / 2, kept_count(k - i));
    __builtin_memcpy(bits, kept + i / 8, ceil_div(k - i, 8));
    step(last, bits, i);
  }
  for (int m = 0; m < M; ++m) out[m] = float(sum_words(sum[m] - (own << 7)));
}
#endif

// ---- tokens

// n numbers as floats, zeros behind them up to `width`.
template <class T>
APART void widen(const T* x, i64 n, i64 width, float* out) {
  for (i64 i = 0; i < width; i += W) {
    Vec v = zero();
    if (i < n) v = i + W <= n ? load(x + i) : load(x + i, int(n - i));
    store(out + i, v);
  }
}
APART void widen(const int8_t* x, i64 n, i64 width, float* out) {
  for (i64 i = 0; i < width; ++i) out[i] = i < n ? float(x[i]) : 0.0f;
}

// What rows of the weight meet: floats, or codes with 128 added.
struct Tokens {
  const float* values;
  const uint8_t* codes;
  i64 width;
};

template <int M, class T>
INLINE void row_sums(const Weight& w, i64 row, const Tokens& x, i64 first, float* out) {
  const T* values = (const T*)w.values + row * kept_count(w.k);
  const uint8_t* kept = w.kept + row * ceil_div(w.k, 8);
#if defined(FASTLLM_DOTS)
  if constexpr (std::is_same_v<T, int8_t>)
    if (x.codes)
      return dot_codes<M>(values, kept, w.k, x.codes + first * x.width, x.width, out);
#endif
  dot_row<M>(values, kept, w.k, x.values + first * x.width, x.width, out);
}

// ---- products

template <class F>
INLINE void with_values(int dtype, const F& call) {
  if (dtype == kInt8)
    call(static_cast<int8_t*>(nullptr));
  else
    with_type(dtype, call);
}

// Rows [from, from + count) of the weight by tokens [first, first + M).
template <int M, class T>
APART void block(const Product& p, const Tokens& x, i64 from, i64 count, i64 first) {
  alignas(64) float sums[M][kRows] = {};
  for (i64 r = 0; r < count; ++r) {
    float row[M];
    row_sums<M, T>(p.w, from + r, x, first, row);
    for (int m = 0; m < M; ++m) sums[m][r] = row[m];
  }
  for (int m = 0; m < M; ++m)
    for (i64 j = 0; j < count; j += W) {
      const int n = int(least(W, count - j));
      Vec v = load(sums[m] + j);
      if (p.w.scales) v = v * load(p.w.scales + from + j, n);
      if (p.x_scales) v = v * set1(p.x_scales[first + m]);
      with_type(p.dtype, [&](auto* type) INLINE_LAMBDA {
        using Out = std::remove_pointer_t<decltype(type)>;
        const Vec sum = p.bias ? v + load((const Out*)p.bias + from + j, n) : v;
        store((Out*)p.out + (first + m) * p.w.n + from + j, sum, n);
      });
    }
}

void multiply(const Product& p) {
  if (p.m == 0 || p.w.n == 0) return;
  const i64 width = ceil_div(p.w.k, kUnit) * kUnit;
  const Scratch scratch(p.m * width);
  Tokens x{scratch.data(), nullptr, width};
  with_values(p.x_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#if defined(FASTLLM_DOTS)
    if constexpr (std::is_same_v<T, int8_t>)
      if (p.w.k <= kLongestInt32) x.codes = (const uint8_t*)scratch.data();
#endif
    for (i64 m = 0; m < p.m; ++m) {
      const T* token = (const T*)p.x + m * p.x_row;
      if (!x.codes) {
        widen(token, p.w.k, width, scratch.data() + m * width);
        continue;
      }
      uint8_t* codes = (uint8_t*)scratch.data() + m * width;
      if constexpr (std::is_same_v<T, int8_t>)
        for (i64 i = 0; i < width; ++i) codes[i] = i < p.w.k ? uint8_t(token[i]) ^ 128 : 128;
    }
  });
  const i64 bytes = p.w.n * p.w.k * (p.w.dtype == kInt8 ? 1 : p.w.dtype == kFloat32 ? 4 : 2) / 2;
  const int threads = useful_threads(bytes * p.m, p.threads);
  with_values(p.w.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(ceil_div(p.w.n, kRows), threads, [&](i64 task) {
      const i64 from = task * kRows, count = least(kRows, p.w.n - from);
      for (i64 m = 0; m < p.m; m += kTokens) {
        const i64 left = p.m - m;
        if (left == 1) block<1, T>(p, x, from, count, m);
        if (left == 2) block<2, T>(p, x, from, count, m);
        if (left == 3) block<3, T>(p, x, from, count, m);
        if (left >= 4) block<4, T>(p, x, from, count, m);
      }
    });
  });
}

// ---- the weight in full

INLINE void write(int8_t* out, Vec v, int n) {
  alignas(64) uint8_t bytes[W];
  store_bytes(bytes, (decltype(load_bytes(nullptr)))nearest(v));
  __builtin_memcpy(out, bytes, n);
}
template <class T>
INLINE void write(T* out, Vec v, int n) {
  if (n == W)
    store(out, v);
  else
    store(out, v, n);
}

void expand_rows(const Expand& e) {
  const Weight& w = e.w;
  with_values(w.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int threads = useful_threads(w.n * w.k * i64(sizeof(T)), e.threads);
    parallel_for(ceil_div(w.n, kRows), threads, [&](i64 task) {
      for (i64 row = task * kRows; row < least(w.n, (task + 1) * kRows); ++row) {
        T* out = (T*)e.out + row * w.k;
        each_vector((const T*)w.values + row * kept_count(w.k), w.kept + row * ceil_div(w.k, 8), w.k,
                    [&](Vec v, i64 i, int) INLINE_LAMBDA {
                      write(out + i, v, int(least(W, w.k - i)));
                    });
      }
    });
  });
}

constexpr Kernels table = {multiply, expand_rows};

// softmax and log_softmax along the last dimension, or along one with others behind it.
#include "cpu/kernels/rows.inl"

// Rows of at most this many elements keep their exponentials: computing them twice takes longer.
constexpr i64 kKept = 32768;

template <bool Stream, class T>
APART void softmax_kept(const T* x, T* y, i64 n) {
  constexpr bool Short = sizeof(T) == 2;
  float kept[kKept];
  Vec top[4] = {set1(-kInf), set1(-kInf), set1(-kInf), set1(-kInf)};
  sweep(n, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
    top[k] = larger(top[k], or_else(get(x + i, lanes), lanes, -kInf));
  });
  Online state;
  state.raise(largest(larger(larger(top[0], top[1]), larger(top[2], top[3]))));
  const Vec base = set1(state.base());
  for (i64 at = 0; at < n; at += kSpan) {
    Vec acc[4] = {zero(), zero(), zero(), zero()};
    sweep(least(kSpan, n - at), [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
      const Vec e = exp_down<Short>(get(x + at + i, lanes) - base);
      put<false>(kept + at + i, e, lanes);
      acc[k] = acc[k] + only(e, lanes);
    });
    state.sum += total(acc);
  }
  const Vec scale = set1(float(1.0 / state.sum));
  sweep(n, [&](auto lanes, i64 i, int) INLINE_LAMBDA {
    put<Stream>(y + i, get(kept + i, lanes) * scale, lanes);
  });
}

template <bool Log, bool Stream, class T>
APART void softmax_row(const T* x, T* y, i64 n) {
  if (!Log && n <= kKept) return softmax_kept<Stream>(x, y, n);
  const Online state = log_sum_exp<sizeof(T) == 2>(x, n, Same{});
  const Split split(state.result());
  const Vec base = set1(state.base()), scale = set1(float(1.0 / state.sum));
  sweep(n, [&](auto lanes, i64 i, int) INLINE_LAMBDA {
    const Vec v = get(x + i, lanes);
    put<Stream>(y + i, Log ? split.from(v) : exp_down<sizeof(T) == 2>(v - base) * scale, lanes);
  });
}

// softmax: y (dy - sum(dy y)); log_softmax: dy - e^y sum(dy).
template <bool Log, class T>
INLINE Vec softmax_term(Vec dy, Vec y) {
  return Log ? dy : dy * y;
}
template <bool Log, class T>
INLINE Vec softmax_gradient(Vec dy, Vec y, Vec sum) {
  return Log ? dy - exp_down<sizeof(T) == 2>(y) * sum : y * (dy - sum);
}

template <bool Log, bool Stream, class T>
APART void softmax_row_backward(const T* dy, const T* y, T* dx, i64 n) {
  double sum = 0;
  for (i64 at = 0; at < n; at += kSpan) {
    Vec acc[4] = {zero(), zero(), zero(), zero()};
    sweep(least(kSpan, n - at), [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
      acc[k] = acc[k] + softmax_term<Log, T>(get(dy + at + i, lanes), get(y + at + i, lanes));
    });
    sum += total(acc);
  }
  const Vec all = set1(float(sum));
  sweep(n, [&](auto lanes, i64 i, int) INLINE_LAMBDA {
    put<Stream>(dx + i, softmax_gradient<Log, T>(get(dy + i, lanes), get(y + i, lanes), all), lanes);
  });
}

// As many neighbouring columns as there is room to keep, n steps of `inner` elements down: memory is
// read once, in pieces of rows; a column alone would evict its own lines wherever inner is a power
// of two.
constexpr i64 kWide = 256;

// How many; 0: a vector of them is too much already.
INLINE i64 columns_kept(i64 n, i64 inner, i64 tensors) {
  return n == 0 ? 0 : least(inner, least(kWide, kKept / tensors / n / W * W));
}

template <bool Log, class T>
APART void softmax_columns(const T* x, T* y, i64 n, i64 inner, i64 width) {
  constexpr bool Short = !Log && sizeof(T) == 2;
  float kept[kKept], top[kWide], sum[kWide];
  sweep(width, [&](auto lanes, i64 c, int) INLINE_LAMBDA {
    put<false>(top + c, set1(-kInf), lanes);
    put<false>(sum + c, zero(), lanes);
  });
  for (i64 i = 0; i < n; ++i)
    sweep(width, [&](auto lanes, i64 c, int) INLINE_LAMBDA {
      const Vec v = get(x + i * inner + c, lanes);
      put<false>(kept + i * width + c, v, lanes);
      put<false>(top + c, larger(get(top + c, lanes), v), lanes);
    });
  sweep(width, [&](auto lanes, i64 c, int) INLINE_LAMBDA {
    const Vec t = get(top + c, lanes);
    put<false>(top + c, choose((Ints)(t.v == set1(-kInf).v), zero(), t), lanes);
  });
  for (i64 i = 0; i < n; ++i)
    sweep(width, [&](auto lanes, i64 c, int) INLINE_LAMBDA {
      const Vec v = get(kept + i * width + c, lanes) - get(top + c, lanes), e = exp_down<Short>(v);
      put<false>(kept + i * width + c, Log ? v : e, lanes);
      put<false>(sum + c, get(sum + c, lanes) + e, lanes);
    });
  if (Log)
    for (i64 c = 0; c < width; ++c) sum[c] = __builtin_logf(sum[c]);
  else
    sweep(width, [&](auto lanes, i64 c, int) INLINE_LAMBDA {
      put<false>(sum + c, div(set1(1.0f), get(sum + c, lanes)), lanes);
    });
  for (i64 i = 0; i < n; ++i)
    sweep(width, [&](auto lanes, i64 c, int) INLINE_LAMBDA {
      const Vec v = get(kept + i * width + c, lanes), s = get(sum + c, lanes);
      put<false>(y + i * inner + c, Log ? v - s : v * s, lanes);
    });
}

template <bool Log, class T>
APART void softmax_columns_backward(const T* dy, const T* y, T* dx, i64 n, i64 inner, i64 width) {
  float kept_dy[kKept / 2], kept_y[kKept / 2], sum[kWide];
  sweep(width, [&](auto lanes, i64 c, int) INLINE_LAMBDA { put<false>(sum + c, zero(), lanes); });
  for (i64 i = 0; i < n; ++i)
    sweep(width, [&](auto lanes, i64 c, int) INLINE_LAMBDA {
      const Vec d = get(dy + i * inner + c, lanes), v = get(y + i * inner + c, lanes);
      put<false>(kept_dy + i * width + c, d, lanes);
      put<false>(kept_y + i * width + c, v, lanes);
      put<false>(sum + c, get(sum + c, lanes) + softmax_term<Log, T>(d, v), lanes);
    });
  for (i64 i = 0; i < n; ++i)
    sweep(width, [&](auto lanes, i64 c, int) INLINE_LAMBDA {
      const Vec d = get(kept_dy + i * width + c, lanes), v = get(kept_y + i * width + c, lanes);
      put<false>(dx + i * inner + c, softmax_gradient<Log, T>(d, v, get(sum + c, lanes)), lanes);
    });
}

// The same of columns too long to keep: one vector of them, read again.
template <bool Log, class T, class L>
INLINE void softmax_column(const T* x, T* y, i64 n, i64 inner, L lanes) {
  constexpr bool Short = !Log && sizeof(T) == 2;
  Vec top = set1(-kInf), sum = zero();
  for (i64 i = 0; i < n; ++i) top = larger(top, get(x + i * inner, lanes));
  top = choose((Ints)(top.v == set1(-kInf).v), zero(), top);
  for (i64 i = 0; i < n; ++i) sum = sum + exp_down<Short>(get(x + i * inner, lanes) - top);
  float logs[W];
  store(logs, sum);
  if (Log)
    for (int k = 0; k < W; ++k) logs[k] = __builtin_logf(logs[k]);
  const Vec log_sum = load(logs), scale = div(set1(1.0f), sum);
  for (i64 i = 0; i < n; ++i) {
    const Vec v = get(x + i * inner, lanes) - top;
    put<false>(y + i * inner, Log ? v - log_sum : exp_down<Short>(v) * scale, lanes);
  }
}

template <bool Log, class T, class L>
INLINE void softmax_column_backward(const T* dy, const T* y, T* dx, i64 n, i64 inner, L lanes) {
  Vec sum = zero();
  for (i64 i = 0; i < n; ++i)
    sum = sum + softmax_term<Log, T>(get(dy + i * inner, lanes), get(y + i * inner, lanes));
  for (i64 i = 0; i < n; ++i)
    put<false>(dx + i * inner,
               softmax_gradient<Log, T>(get(dy + i * inner, lanes), get(y + i * inner, lanes), sum),
               lanes);
}

// Calls row(at), columns(at, how many) or, where `kept` is 0, column(lanes, at), for all of
// [outer, n, inner].
template <class R, class C, class V>
INLINE void softmax_deal(i64 outer, i64 n, i64 inner, i64 kept, i64 bytes, int threads, bool fence,
                         const R& row, const C& columns, const V& column) {
  threads = useful_threads(bytes, threads);
  const i64 width = inner == 1 ? 1 : kept ? kept : W;
  const i64 strips = ceil_div(inner, width), count = outer * strips;
  const i64 step = share(count, bytes, threads);
  parallel_for(ceil_div(count, step), threads, [&](i64 task) {
    for (i64 i = task * step; i < least(count, (task + 1) * step); ++i) {
      const i64 from = i % strips * width, at = i / strips * n * inner + from;
      const i64 wide = least(width, inner - from);
      if (inner == 1)
        row(at);
      else if (kept)
        columns(at, wide);
      else if (wide == W)
        column(All{}, at);
      else
        column(First{int(wide)}, at);
    }
    if (fence) stream_fence();
  });
}

template <class F>
INLINE void with_log(bool log, const F& f) {
  log ? f(std::true_type{}) : f(std::false_type{});
}

void softmax_fwd(const Forward& a) {
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x = static_cast<const T*>(a.input);
    T* y = static_cast<T*>(a.output);
    const i64 row_bytes = a.n * i64(sizeof(T)), bytes = a.outer * a.inner * row_bytes;
    const bool stream = a.inner == 1 && streams(y, row_bytes, a.outer);
    with_log(a.log, [&](auto log) {
      constexpr bool Log = decltype(log)::value;
      softmax_deal(
          a.outer, a.n, a.inner, columns_kept(a.n, a.inner, 1), bytes, a.threads, stream,
          [&](i64 at) {
            stream ? softmax_row<Log, true>(x + at, y + at, a.n)
                   : softmax_row<Log, false>(x + at, y + at, a.n);
          },
          [&](i64 at, i64 wide) { softmax_columns<Log>(x + at, y + at, a.n, a.inner, wide); },
          [&](auto lanes, i64 at) { softmax_column<Log>(x + at, y + at, a.n, a.inner, lanes); });
    });
  });
}

void softmax_bwd(const Backward& a) {
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *dy = static_cast<const T*>(a.grad_output), *y = static_cast<const T*>(a.output);
    T* dx = static_cast<T*>(a.grad_input);
    const i64 row_bytes = a.n * i64(sizeof(T)), bytes = a.outer * a.inner * row_bytes;
    const bool stream = a.inner == 1 && streams(dx, row_bytes, a.outer);
    with_log(a.log, [&](auto log) {
      constexpr bool Log = decltype(log)::value;
      softmax_deal(
          a.outer, a.n, a.inner, columns_kept(a.n, a.inner, 2), 2 * bytes, a.threads, stream,
          [&](i64 at) {
            stream ? softmax_row_backward<Log, true>(dy + at, y + at, dx + at, a.n)
                   : softmax_row_backward<Log, false>(dy + at, y + at, dx + at, a.n);
          },
          [&](i64 at, i64 wide) {
            softmax_columns_backward<Log>(dy + at, y + at, dx + at, a.n, a.inner, wide);
          },
          [&](auto lanes, i64 at) {
            softmax_column_backward<Log>(dy + at, y + at, dx + at, a.n, a.inner, lanes);
          });
    });
  });
}

constexpr Kernels table = {softmax_fwd, softmax_bwd};

// Activations and gated products: f(x), f(gate) * up, and their gradients, in one pass. fp32 math,
// one rounding; backward computes f again from its input.
#include "cpu/kernels/elementwise.inl"
#include "cpu/kernels/math.inl"

// f(x), and f'(x) where it is asked for. Short: as exact as a 16-bit result needs.
struct Point {
  Vec value, slope;
};

struct Silu {
  template <bool Slope, bool Short>
  INLINE_MEMBER static Point at(Vec x) {
    if (!Slope) return {x * sigmoid<Short>(x), zero()};
    const Sigmoid s = sigmoids<Short>(x);
    return {x * s.value, s.value * fma(x, s.complement, set1(1.0f))};
  }
};

struct Gelu {
  template <bool Slope, bool Short>
  INLINE_MEMBER static Point at(Vec x) {
    const Normal n = normal<Short>(x);
    return {x * n.cumulative, Slope ? fma(x, n.density, n.cumulative) : zero()};
  }
};

// 0.5 x (1 + tanh(u)) is x sigmoid(2 u), without the cancellation.
struct GeluTanh {
  template <bool Slope, bool Short>
  INLINE_MEMBER static Point at(Vec x) {
    constexpr float kScale = 1.59576912f, kCube = 0.044715f;  // 2 sqrt(2 / pi)
    const Vec square = x * x;
    const Vec u = x * set1(kScale) * fma(square, set1(kCube), set1(1.0f));
    if (!Slope) return {x * sigmoid<Short>(u), zero()};
    const Sigmoid s = sigmoids<Short>(u);
    const Vec along = x * set1(kScale) * fma(square, set1(3 * kCube), set1(1.0f));
    return {x * s.value, s.value * fma(along, s.complement, set1(1.0f))};
  }
};

struct Relu2 {
  template <bool Slope, bool Short>
  INLINE_MEMBER static Point at(Vec x) {
    const Vec r = at_least(x, zero());
    return {r * r, r + r};
  }
};

// The caches' own prefetching stops at the end of a page.
INLINE void ask(const void* p) { __builtin_prefetch((const char*)p + 2048); }

template <class F, bool Gated, class T>
APART void forward_part(const T* x, const T* up, T* y, i64 n, bool past_caches) {
  each(n, [&](auto lanes, i64 i) INLINE_LAMBDA {
    ask(x + i);
    if (Gated) ask(up + i);
    Vec v = F::template at<false, sizeof(T) == 2>(get(x + i, lanes)).value;
    if (Gated) v = v * get(up + i, lanes);
    write(past_caches, y + i, v, lanes);
  });
}

template <class F, bool Gated, class T>
APART void backward_part(const T* dy, const T* x, const T* up, T* dx, T* dup, i64 n,
                         bool past_caches) {
  each(n, [&](auto lanes, i64 i) INLINE_LAMBDA {
    ask(dy + i);
    ask(x + i);
    if (Gated) ask(up + i);
    const Vec g = get(dy + i, lanes);
    const Point f = F::template at<true, sizeof(T) == 2>(get(x + i, lanes));
    Vec along = g;
    if (Gated) {
      along = g * get(up + i, lanes);
      if (dup) write(past_caches, dup + i, g * f.value, lanes);
    }
    if (dx) write(past_caches, dx + i, along * f.slope, lanes);
  });
}

template <class F>
INLINE void with_function(int function, const F& call) {
  if (function == kSilu) call(Silu{});
  if (function == kGelu) call(Gelu{});
  if (function == kGeluTanh) call(GeluTanh{});
  if (function == kRelu2) call(Relu2{});
}

void forward(const Forward& a) {
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const i64 bytes = a.rows * a.cols * i64(sizeof(T));
    const bool stream = bytes >= kPastCaches && lined_up(a.output) && a.cols * sizeof(T) % 64 == 0;
    by_parts(a.rows, a.cols, bytes, a.threads, [&](i64 row, i64 col, i64 n) {
      const T* x = (const T*)a.input + row * a.input_stride + col;
      T* y = (T*)a.output + row * a.cols + col;
      with_function(a.function, [&](auto f) {
        using F = decltype(f);
        if (a.up)
          forward_part<F, true>(x, (const T*)a.up + row * a.up_stride + col, y, n, stream);
        else
          forward_part<F, false>(x, x, y, n, stream);
      });
    });
  });
}

void backward(const Backward& a) {
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const i64 bytes = a.rows * a.cols * i64(sizeof(T));
    const bool stream = bytes >= kPastCaches && lined_up(a.grad_input) && lined_up(a.grad_up) &&
                        a.cols * sizeof(T) % 64 == 0;
    by_parts(a.rows, a.cols, bytes, a.threads, [&](i64 row, i64 col, i64 n) {
      const T* dy = (const T*)a.grad_output + row * a.grad_stride + col;
      const T* x = (const T*)a.input + row * a.input_stride + col;
      T* dx = a.grad_input ? (T*)a.grad_input + row * a.cols + col : nullptr;
      T* dup = a.grad_up ? (T*)a.grad_up + row * a.cols + col : nullptr;
      with_function(a.function, [&](auto f) {
        using F = decltype(f);
        if (a.up)
          backward_part<F, true>(dy, x, (const T*)a.up + row * a.up_stride + col, dx, dup, n,
                                 stream);
        else
          backward_part<F, false>(dy, x, x, dx, (T*)nullptr, n, stream);
      });
    });
  });
}

constexpr Kernels table = {forward, backward};

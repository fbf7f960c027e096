// Cross entropy over rows of logits: one read forward, one read and one write backward.
#include "cpu/kernels/rows.inl"

// Exponentials of 16-bit logits are made to 1e-5: the logits themselves are off by hundreds of that.
template <class T>
constexpr bool kShort = sizeof(T) == 2;

// Calls f with the function that makes logits of inputs.
template <class F>
INLINE void with_logits(const Logits& l, const F& f) {
  if (l.softcap != 0.0f)
    f(Capped{l.scale, l.softcap});
  else if (l.scale != 1.0f)
    f(Scaled{l.scale});
  else
    f(Same{});
}

INLINE bool ignored(const CrossEntropy& a, i64 row) {
  return a.target && a.target[row] == a.ignore_index;
}
INLINE double class_weight(const CrossEntropy& a, i64 c) { return a.weight ? a.weight[c] : 1.0; }
// The column of a row's target; -1: another part has it, or targets are probabilities.
INLINE i64 own_column(const CrossEntropy& a, i64 row) {
  if (!a.target) return -1;
  const i64 t = a.target[row] - a.first;
  return t >= 0 && t < a.cols ? t : -1;
}
// What the target's own class counts, and what each class does.
INLINE double hard_share(const CrossEntropy& a, i64 row) {
  return (1.0 - a.smoothing) * class_weight(a, a.target[row]);
}
INLINE double spread(const CrossEntropy& a) { return a.smoothing / double(a.classes); }

// What a mean divides by: the weights of the targets, or the rows where targets are probabilities.
INLINE double mean_divisor(const CrossEntropy& a) {
  if (a.reduction != kMean) return 1.0;
  if (!a.target) return double(a.rows);
  double sum = 0;
  for (i64 row = 0; row < a.rows; ++row)
    if (!ignored(a, row)) sum += class_weight(a, a.target[row]);
  return sum;
}

INLINE double weight_sum(const CrossEntropy& a) {
  if (!a.weight) return double(a.classes);
  double sum = 0;
  for (i64 i = 0; i < a.classes; ++i) sum += a.weight[i];
  return sum;
}

// The targets of a row as soft targets: weight * ((1 - smoothing) * p + smoothing / C). Index
// targets bring only the second term.
template <class T>
struct Soft {
  const T* probs;  // null: none
  const float* weight;
  float keep_share, spread;
  template <class L>
  INLINE_MEMBER Vec get_at(i64 i, L lanes) const {
    Vec v = set1(spread);
    if (probs) v = fma(get(probs + i, lanes), set1(keep_share), v);
    return weight ? v * get(weight + i, lanes) : v;
  }
};

template <class T>
INLINE Soft<T> soft_targets(const CrossEntropy& a, i64 row) {
  return {a.probs ? static_cast<const T*>(a.probs) + row * a.cols : nullptr,
          a.weight ? a.weight + a.first : nullptr, 1.0f - a.smoothing, float(spread(a))};
}

struct SoftSums {
  double dot, weight;  // of soft target * log-probability, and of the soft targets
};

// A sum and what its roundings lost: targets that add up to 1 must not bring an error of their own.
struct Compensated {
  Vec sum, lost;
  INLINE_MEMBER Compensated() : sum(zero()), lost(zero()) {}
  INLINE_MEMBER void add(Vec v) {
    const Vec next = sum + v, back = next - sum;
    lost = lost + ((sum - (next - back)) + (v - back));
    sum = next;
  }
  INLINE_MEMBER double result() const {
    float lanes[W], rests[W];
    store(lanes, sum);
    store(rests, lost);
    double all = 0;
    for (int i = 0; i < W; ++i)  // an infinite sum has lost inf - inf
      all += double(lanes[i]) + (__builtin_isfinite(lanes[i]) ? double(rests[i]) : 0.0);
    return all;
  }
};

template <class T, class F>
APART SoftSums soft_sums(const T* x, i64 n, const Soft<T>& soft, const F& logit, double lse) {
  const Split split(lse);
  Compensated dot[4], weight[4];
  sweep(n, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
    const Vec v = only(soft.get_at(i, lanes), lanes);
    dot[k].add(v * only(split.from(logit(get(x + i, lanes))), lanes));
    weight[k].add(v);
  });
  SoftSums sums = {0, 0};
  for (int k = 0; k < 4; ++k) {
    sums.dot += dot[k].result();
    sums.weight += weight[k].result();
  }
  return sums;
}

// The loss of a row. Of a part of one: minus the sum of soft target * logit, so that the parts' sum
// plus (sum of soft targets) * lse + z_loss * lse^2 is the loss.
template <class T, class F>
APART double row_loss(const CrossEntropy& a, i64 row, const F& logit, double* lse_out) {
  const T* x = static_cast<const T*>(a.input) + row * a.cols;
  const Online state = log_sum_exp<kShort<T>>(x, a.cols, logit);
  const double lse = *lse_out = state.result();
  if (ignored(a, row)) return 0.0;
  const double base = a.part ? 0.0 : lse;
  double loss = a.z_loss ? double(a.z_loss) * base * base : 0.0;  // 0 * inf is NaN
  const i64 t = own_column(a, row);
  if (t >= 0) loss += hard_share(a, row) * (base - logit.at(element(x + t)));
  if (!a.target || a.smoothing)
    loss -= soft_sums(x, a.cols, soft_targets<T>(a, row), logit, base).dot;
  return loss;
}

// gradient = slope * (share * p - soft target), with p = e^(logit - lse).
template <bool Stream, bool HasSoft, class T, class F>
APART void row_gradient(const T* x, T* dx, i64 n, const Soft<T>& soft, float g, float factor,
                        const F& logit, double lse) {
  const Split split(lse);
  sweep(n, [&](auto lanes, i64 i, int) INLINE_LAMBDA {
    const Vec raw = get(x + i, lanes), value = logit(raw);
    Vec out = exp_down<kShort<T>>(kShort<T> ? value - split.high : split.from(value));
    out = out * set1(factor);
    if (HasSoft) out = out - soft.get_at(i, lanes) * set1(g);
    if (!std::is_same<F, Same>::value) out = out * logit.slope(raw);
    put_quick<Stream>(dx + i, out, lanes);
  });
}

template <class T>
INLINE void clear_row(T* dx, i64 n) {
  sweep(n, [&](auto lanes, i64 i, int) INLINE_LAMBDA { put<false>(dx + i, zero(), lanes); });
}

struct RowShares {
  double g, weight_sum;  // the upstream gradient over the divisor; the sum of class weights
};

template <bool Stream, class T, class F>
APART void row_backward(const CrossEntropyBackward& b, i64 row, RowShares r, const F& logit) {
  const CrossEntropy& a = b.of;
  const i64 n = a.cols;
  const T* x = static_cast<const T*>(a.input) + row * n;
  T* dx = static_cast<T*>(b.grad_input) + row * n;
  if (ignored(a, row)) return clear_row(dx, n);
  const double lse = b.lse[row];
  const Soft<T> soft = soft_targets<T>(a, row);
  double mass, hard = 0;
  if (a.target) {
    hard = hard_share(a, row);
    mass = hard + spread(a) * r.weight_sum;
  } else {
    mass = soft_sums(x, n, soft, logit, lse).weight;
  }
  const double z = a.z_loss ? 2.0 * a.z_loss * lse : 0.0;
  // before the row is written: dx may be x
  const i64 t = own_column(a, row);
  const double raw = element(x + most(t, 0)), log_p = logit.at(raw) - lse;
  const float g = float(r.g), factor = float(r.g * (mass + z));
  if (!a.target || a.smoothing != 0.0f)
    row_gradient<Stream, true>(x, dx, n, soft, g, factor, logit, lse);
  else
    row_gradient<Stream, false>(x, dx, n, soft, g, factor, logit, lse);
  if (t < 0) return;
  // The true class again, without the cancellation of p - 1 as p -> 1.
  const double own = hard + spread(a) * class_weight(a, a.target[row]);
  const double d = mass * __builtin_expm1(log_p) + (mass - own) + z * __builtin_exp(log_p);
  set_element(dx + t, r.g * d * logit.slope_at(raw));
}

// Rows up to this length keep their exponentials in the second-level cache.
constexpr i64 kKept = 128 << 10;

// Log-sum-exp that keeps e^(x - bases[span]) of every element, 0 where that base is -inf.
template <class T>
INLINE Online online_kept(const T* x, i64 n, float* kept, float* bases) {
  Online state;
  for (i64 at = 0; at < n; at += kSpan) {
    online_span<kShort<T>, true>(x + at, least(kSpan, n - at), Same{}, state, kept + at);
    bases[at / kSpan] = state.top;  // -inf: all were, and their share stays 0
  }
  return state;
}

// A span of the gradient of a row whose exponentials were kept.
template <bool Stream, bool HasSoft, class T>
APART void span_gradient(const float* kept, T* dx, i64 at, i64 n, float factor, const Soft<T>& soft,
                         float g) {
  sweep(n, [&](auto lanes, i64 i, int) INLINE_LAMBDA {
    Vec out = get(kept + at + i, lanes) * set1(factor);
    if (HasSoft) out = out - soft.get_at(at + i, lanes) * set1(g);
    put_quick<Stream>(dx + at + i, out, lanes);
  });
}

// Loss and gradient of a row of plain logits with an index target: one exponential an element.
template <bool Stream, class T>
APART double row_both(const CrossEntropyForward& f, i64 row, RowShares r, float* kept) {
  const CrossEntropy& a = f.of;
  const i64 n = a.cols, t = a.target[row];
  const T* x = static_cast<const T*>(a.input) + row * n;
  T* dx = static_cast<T*>(f.grad_input) + row * n;
  float bases[kKept / kSpan];
  const Online state = online_kept(x, n, kept, bases);
  const double lse = f.lse[row] = state.result();
  const double hard = hard_share(a, row), mass = hard + spread(a) * r.weight_sum;
  const double z = a.z_loss ? 2.0 * a.z_loss * lse : 0.0, log_p = element(x + t) - lse;
  const Soft<T> soft = soft_targets<T>(a, row);
  const float g = float(r.g);
  for (i64 at = 0; at < n; at += kSpan) {
    const float shift = exp_one(bases[at / kSpan] - state.base());
    const float factor = float(r.g * (mass + z) * shift / state.sum);
    if (a.smoothing != 0.0f)
      span_gradient<Stream, true>(kept, dx, at, least(kSpan, n - at), factor, soft, g);
    else
      span_gradient<Stream, false>(kept, dx, at, least(kSpan, n - at), factor, soft, g);
  }
  const double own = hard + spread(a) * class_weight(a, t);
  set_element(dx + t, r.g * (mass * __builtin_expm1(log_p) + (mass - own) +
                             z * __builtin_exp(log_p)));
  double loss = -hard * log_p + (a.z_loss ? double(a.z_loss) * lse * lse : 0.0);
  if (a.smoothing != 0.0f) loss -= soft_sums(x, n, soft, Same{}, lse).dot;
  return loss;
}

// Loss and, where wanted, gradient of a row.
template <bool Stream, class T, class F>
INLINE double row_forward(const CrossEntropyForward& f, i64 row, RowShares r, const F& logit,
                          float* kept) {
  if (!f.grad_input) return row_loss<T>(f.of, row, logit, f.lse + row);
  if (std::is_same<F, Same>::value && kept && f.of.target && !ignored(f.of, row))
    return row_both<Stream, T>(f, row, r, kept);
  const double loss = row_loss<T>(f.of, row, logit, f.lse + row);
  row_backward<Stream, T>({f.of, f.lse, nullptr, f.grad_input, nullptr}, row, r, logit);
  return loss;
}

void cross_entropy_fwd(const CrossEntropyForward& f) {
  const CrossEntropy& a = f.of;
  double* const losses = f.losses;
  const double divisor = mean_divisor(a);
  const RowShares r = {f.upstream / divisor, a.smoothing && f.grad_input ? weight_sum(a) : 0.0};
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const i64 row_bytes = a.cols * i64(sizeof(T)), bytes = a.rows * row_bytes;
    const bool stream = f.grad_input != a.input && streams(f.grad_input, row_bytes, a.rows);
    const int threads = useful_threads(bytes, a.threads);
    const i64 step = share(a.rows, bytes, threads);
    with_logits(a.logits, [&](auto logit) {
      parallel_for(ceil_div(a.rows, step), threads, [&](i64 task) {
        const bool keep = f.grad_input && a.cols <= kKept;
        const Scratch kept(keep ? a.cols : 0);
        float* p = keep ? kept.data() : nullptr;
        for (i64 row = task * step; row < least(a.rows, (task + 1) * step); ++row)
          losses[row] = stream ? row_forward<true, T>(f, row, r, logit, p)
                               : row_forward<false, T>(f, row, r, logit, p);
        if (stream) stream_fence();
      });
    });
    T* out = static_cast<T*>(f.loss);
    if (!out) return;
    if (a.reduction == kNone) {
      for (i64 row = 0; row < a.rows; ++row) set_element(out + row, losses[row]);
      return;
    }
    double sum = 0;
    for (i64 row = 0; row < a.rows; ++row) sum += losses[row];
    set_element(out, sum / divisor);
  });
}

// The gradient of probability targets: -g * weight * (1 - smoothing) * log p.
template <class T, class F>
APART void row_probs_gradient(const CrossEntropyBackward& b, i64 row, double g, const F& logit) {
  const CrossEntropy& a = b.of;
  const T* x = static_cast<const T*>(a.input) + row * a.cols;
  T* out = static_cast<T*>(b.grad_probs) + row * a.cols;
  const Split split(b.lse[row]);
  const Vec factor = set1(float(-g * (1.0 - a.smoothing)));
  sweep(a.cols, [&](auto lanes, i64 i, int) INLINE_LAMBDA {
    Vec v = split.from(logit(get(x + i, lanes))) * factor;
    if (a.weight) v = v * get(a.weight + i, lanes);
    put<false>(out + i, v, lanes);
  });
}

void cross_entropy_bwd(const CrossEntropyBackward& b) {
  const CrossEntropy& a = b.of;
  const double divisor = mean_divisor(a), weights = a.smoothing ? weight_sum(a) : 0.0;
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const i64 row_bytes = a.cols * i64(sizeof(T));
    const bool stream = b.grad_input != a.input && streams(b.grad_input, row_bytes, a.rows);
    const int threads = useful_threads(2 * a.rows * row_bytes, a.threads);
    const i64 step = share(a.rows, a.rows * row_bytes, threads);
    with_logits(a.logits, [&](auto logit) {
      parallel_for(ceil_div(a.rows, step), threads, [&](i64 task) {
        for (i64 row = task * step; row < least(a.rows, (task + 1) * step); ++row) {
          const double g = b.grad_loss[a.reduction == kNone ? row : 0] / divisor;
          if (b.grad_probs) row_probs_gradient<T>(b, row, g, logit);
          if (!b.grad_input) continue;
          stream ? row_backward<true, T>(b, row, {g, weights}, logit)
                 : row_backward<false, T>(b, row, {g, weights}, logit);
        }
        if (stream) stream_fence();
      });
    });
  });
}

#include "cpu/kernels/distill.inl"

constexpr Kernels table = {cross_entropy_fwd, cross_entropy_bwd, distill_fwd, distill_bwd};

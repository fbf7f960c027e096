// Divergences between a student's and a teacher's distribution, row by row.

// One element of both distributions; where a probability is 0 its term is, whatever its logarithm.
struct Pair {
  Vec p, log_p, q, log_q;  // student, teacher
};

template <class T, class L>
INLINE Pair pair_at(const T* student, const T* teacher, i64 i, L lanes, Vec scale, const Split& s,
                    const Split& t) {
  const Vec log_p = s.from(get(student + i, lanes) * scale);
  const Vec log_q = t.from(get(teacher + i, lanes) * scale);
  return {only(exp_down(log_p), lanes), log_p, only(exp_down(log_q), lanes), log_q};
}

INLINE Vec times_log(Vec p, Vec log_ratio) { return choose(less(zero(), p), p * log_ratio, zero()); }

// log((p + q) / 2)
INLINE Vec log_mixture(const Pair& e) {
  const Vec top = larger(e.log_p, e.log_q), least_ = choose(less(e.log_p, e.log_q), e.log_p, e.log_q);
  return top + (log_normal(exp_down(least_ - top) + set1(1.0f)) - set1(0.693147181f));
}

INLINE Vec sign_of(Vec a) {
  return choose(less(zero(), a), set1(1.0f), choose(less(a, zero()), set1(-1.0f), zero()));
}

// The two sums of a row: the loss, and the student's mean of what its gradient subtracts.
template <int Kind>
INLINE void divergence_terms(const Pair& e, Vec& loss, Vec& mean) {
  if (Kind == kForwardKL) {
    loss = loss + times_log(e.q, e.log_q - e.log_p);
  } else if (Kind == kReverseKL) {
    loss = loss + times_log(e.p, e.log_p - e.log_q);
  } else if (Kind == kJensenShannon) {
    const Vec m = log_mixture(e), own = times_log(e.p, e.log_p - m);
    loss = loss + (times_log(e.q, e.log_q - m) + own) * set1(0.5f);
    mean = mean + own;
  } else {
    const Vec off = e.p - e.q;
    loss = fma(abs(off), set1(0.5f), loss);
    mean = fma(e.p, sign_of(off), mean);
  }
}

template <int Kind, class T>
APART void distill_row(const DistillForward& f, i64 row) {
  const Distill& a = f.of;
  const i64 n = a.cols;
  const T* student = static_cast<const T*>(a.student) + row * n;
  const T* teacher = static_cast<const T*>(a.teacher) + row * n;
  const Scaled logit{a.inverse_temperature};
  double* stats = f.stats + 3 * row;
  stats[0] = log_sum_exp(student, n, logit).result();
  stats[1] = log_sum_exp(teacher, n, logit).result();
  const Split s(stats[0]), t(stats[1]);
  const Vec scale = set1(a.inverse_temperature);
  double loss = 0, mean = 0;
  for (i64 at = 0; at < n; at += kSpan) {
    Vec losses[4] = {zero(), zero(), zero(), zero()}, means[4] = {zero(), zero(), zero(), zero()};
    sweep(least(kSpan, n - at), [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
      divergence_terms<Kind>(pair_at(student, teacher, at + i, lanes, scale, s, t), losses[k],
                             means[k]);
    });
    loss += total(losses);
    mean += total(means);
  }
  f.loss[row] = float(loss);
  stats[2] = Kind == kReverseKL ? loss : mean;
}

template <int Kind, bool Stream, class T>
APART void distill_row_backward(const DistillBackward& b, i64 row) {
  const Distill& a = b.of;
  const i64 n = a.cols;
  const T* student = static_cast<const T*>(a.student) + row * n;
  const T* teacher = static_cast<const T*>(a.teacher) + row * n;
  T* out = static_cast<T*>(b.grad_student) + row * n;
  const double* stats = b.stats + 3 * row;
  const Split s(stats[0]), t(stats[1]);
  const Vec scale = set1(a.inverse_temperature), mean = set1(float(stats[2]));
  const float half = Kind == kJensenShannon || Kind == kTotalVariation ? 0.5f : 1.0f;
  const Vec g = set1(b.grad_loss[row] * a.inverse_temperature * half);
  sweep(n, [&](auto lanes, i64 i, int) INLINE_LAMBDA {
    const Pair e = pair_at(student, teacher, i, lanes, scale, s, t);
    Vec d;
    if (Kind == kForwardKL)
      d = e.p - e.q;
    else if (Kind == kReverseKL)
      d = times_log(e.p, (e.log_p - e.log_q) - mean);
    else if (Kind == kJensenShannon)
      d = times_log(e.p, (e.log_p - log_mixture(e)) - mean);
    else
      d = e.p * (sign_of(e.p - e.q) - mean);
    put<Stream>(out + i, d * g, lanes);
  });
}

template <class F>
INLINE void with_divergence(int kind, const F& f) {
  if (kind == kForwardKL) f(std::integral_constant<int, kForwardKL>{});
  if (kind == kReverseKL) f(std::integral_constant<int, kReverseKL>{});
  if (kind == kJensenShannon) f(std::integral_constant<int, kJensenShannon>{});
  if (kind == kTotalVariation) f(std::integral_constant<int, kTotalVariation>{});
}

// Calls f(type, kind, row) for each row, in parallel.
template <class F>
INLINE void each_row(const Distill& a, bool fence, const F& f) {
  with_type(a.dtype, [&](auto* type) {
    const i64 bytes = 2 * a.rows * a.cols * i64(sizeof(*type));
    const int threads = useful_threads(bytes, a.threads);
    const i64 step = share(a.rows, bytes, threads);
    with_divergence(a.divergence, [&](auto kind) {
      parallel_for(ceil_div(a.rows, step), threads, [&](i64 task) {
        for (i64 row = task * step; row < least(a.rows, (task + 1) * step); ++row)
          f(type, kind, row);
        if (fence) stream_fence();
      });
    });
  });
}

void distill_fwd(const DistillForward& f) {
  each_row(f.of, false, [&](auto* type, auto kind, i64 row) {
    distill_row<decltype(kind)::value, std::remove_pointer_t<decltype(type)>>(f, row);
  });
}

void distill_bwd(const DistillBackward& b) {
  const i64 row_bytes = b.of.cols * (b.of.dtype == kFloat32 ? 4 : 2);
  const bool stream =
      b.grad_student != b.of.student && streams(b.grad_student, row_bytes, b.of.rows);
  each_row(b.of, stream, [&](auto* type, auto kind, i64 row) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int Kind = decltype(kind)::value;
    stream ? distill_row_backward<Kind, true, T>(b, row)
           : distill_row_backward<Kind, false, T>(b, row);
  });
}

// RMSNorm and LayerNorm over contiguous rows, with or without a residual added first.

// Moved through the caches, an output is read from memory before it is written over; past them it
// is not. Worth it once the rows in flight no longer stay in the second-level caches for whoever
// reads them next.
constexpr i64 kStreamBytes = 4 << 20;

INLINE bool aligned(const void* p, i64 row_bytes) {
  return ((uintptr_t)p | uintptr_t(row_bytes)) % 64 == 0;
}

// Rows a task takes: even shares while the data is small, else enough tasks that a delayed thread
// costs little.
INLINE i64 rows_per_task(i64 rows, i64 bytes, int threads) {
  const i64 tasks = bytes < kStreamBytes ? threads : 8 * i64(threads);
  return most(1, ceil_div(rows, tasks));
}

template <bool Center, bool Add, bool Stream, class T>
APART void norm_row(const T* x, const T* r, const float* w, const float* b, T* y, T* h, i64 n,
                    double inverse, float eps) {
  float scale, mean = 0, left = 0;
  if (Center) {
    const Moments m = moments<Add>(x, r, n, inverse);
    mean = float(m.mean);
    scale = 1.0f / __builtin_sqrtf(float(m.variance) + eps);
    left = float(mean - m.mean) * scale;
  } else {
    scale = 1.0f / __builtin_sqrtf(float(sum_squares<Add>(x, r, n) * inverse) + eps);
  }
  const Vec scales = set1(scale), means = set1(mean), lefts = set1(left);
  const i64 ahead = reach<T>(n);
  sweep(n, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
    prefetch(x + i, ahead, k);
    if (Add) prefetch(r + i, ahead, k);
    const Vec v = value<Add>(x, r, i, lanes), weight = get(w + i, lanes);
    if (Add) put<Stream>(h + i, v, lanes);
    if (Center)
      put<Stream>(y + i, fma(fma(v - means, scales, lefts), weight, get(b + i, lanes)), lanes);
    else
      put<Stream>(y + i, v * scales * weight, lanes);
  });
}

template <bool Center, bool Add, bool Stream, class T>
inline void norm_rows(const Forward& a, const float* w, const float* b, i64 from, i64 to) {
  const i64 n = a.cols;
  const double inverse = 1.0 / double(n);
  for (i64 row = from; row < to; ++row) {
    const i64 at = row * n;
    norm_row<Center, Add, Stream>((const T*)a.input + at, Add ? (const T*)a.residual + at : nullptr,
                                  w, b, (T*)a.output + at, Add ? (T*)a.new_residual + at : nullptr,
                                  n, inverse, float(a.eps));
  }
  if (Stream) stream_fence();
}

template <bool Center>
inline void norm_forward(const Forward& a) {
  const i64 n = a.cols;
  if (a.rows == 0 || n == 0) return;
  const Scratch scratch(2 * n);
  const float* w = prepared(a.weight, a.weight_dtype, n, a.weight_offset, 1.0f, scratch.data());
  const float* b =
      Center ? prepared(a.bias, a.weight_dtype, n, 0.0f, 0.0f, scratch.data() + n) : nullptr;
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const i64 row_bytes = n * i64(sizeof(T)), bytes = a.rows * row_bytes;
    const bool stream = bytes >= kStreamBytes && aligned(a.output, row_bytes) &&
                        (!a.residual || aligned(a.new_residual, row_bytes));
    const int threads = useful_threads(bytes, a.threads);
    const i64 step = rows_per_task(a.rows, bytes, threads);
    parallel_for(ceil_div(a.rows, step), threads, [&](i64 task) {
      const i64 from = task * step, to = least(a.rows, from + step);
      if (a.residual)
        stream ? norm_rows<Center, true, true, T>(a, w, b, from, to)
               : norm_rows<Center, true, false, T>(a, w, b, from, to);
      else
        stream ? norm_rows<Center, false, true, T>(a, w, b, from, to)
               : norm_rows<Center, false, false, T>(a, w, b, from, to);
    });
  });
}

struct GradientSums {
  double mean, variance;  // of x; without Center 0 and the mean square
  double g, gx;           // sums of g = dy * w and of g * (x - mean)
};

// As moments(), with the sums that backward needs taken in the second pass.
template <bool Center, class T>
INLINE GradientSums gradient_sums(const T* x, const T* dy, const float* w, i64 n, double inverse) {
  Merge blocks;
  double squares = 0, sum_g = 0, sum_gx = 0, sum_shifted = 0;
  for (i64 at = 0; at < n; at += kBlock) {
    const i64 size = least(kBlock, n - at);
    const double inverse_size = size == n ? inverse : 1.0 / double(size);
    const float guess = Center ? block_sum<false>(x + at, x, size) * float(inverse_size) : 0.0f;
    const Vec shift = set1(guess);
    Vec dev[4] = {zero(), zero(), zero(), zero()}, sq[4] = {zero(), zero(), zero(), zero()};
    Vec gs[4] = {zero(), zero(), zero(), zero()}, gx[4] = {zero(), zero(), zero(), zero()};
    sweep(size, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
      const Vec g = get(dy + at + i, lanes) * get(w + at + i, lanes);
      Vec v = get(x + at + i, lanes);
      if (Center) {
        v = only(v - shift, lanes);
        dev[k] = dev[k] + v;
        gs[k] = gs[k] + g;
      }
      sq[k] = fma(v, v, sq[k]);
      gx[k] = fma(g, v, gx[k]);
    });
    float sums[4];
    hsum4({merged(sq), merged(gx), merged(dev), merged(gs)}, sums);
    sum_gx += sums[1];
    if (Center) {
      sum_g += sums[3];
      sum_shifted += double(guess) * sums[3];
      blocks.add(guess, sums[2], sums[0], size, inverse_size);
    } else {
      squares += sums[0];
    }
  }
  if (!Center) return {0.0, squares * inverse, 0.0, sum_gx};
  return {blocks.mean, blocks.variance(inverse), sum_g,
          sum_gx + (sum_shifted - blocks.mean * sum_g)};
}

// With g = dy * w and z = (x - mean) * rstd, dx = rstd * (g - mean(g) - z * mean(g * z)); RMSNorm
// drops the means of x and g. dw and db are the sums over rows of dy * z and dy, kept in fp32 by
// the task that owns the rows.
template <bool Center, bool Params, bool Stream, class T>
APART void norm_backward_row(const T* dy, const T* dh, const T* x, const float* w, T* dx, float* dw,
                             float* db, i64 n, double inverse, double eps) {
  const GradientSums sums = gradient_sums<Center>(x, dy, w, n, inverse);
  const double rstd = 1.0 / __builtin_sqrt(sums.variance + eps);
  const float mean = float(sums.mean);
  const double left = (double(mean) - sums.mean) * rstd;
  const Vec means = set1(mean);
  // The factors of dx in double, rounded once: where g and z * mean(g * z) nearly cancel, that
  // counts.
  const double pull = -rstd * sums.gx * inverse;
  const Vec scales = set1(float(rstd)), lefts = set1(float(left)), pulls = set1(float(rstd * pull));
  const Vec level = set1(float(left * pull - sums.g * inverse));
  const i64 ahead = reach<T>(n);
  sweep(n, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
    prefetch(x + i, ahead, k);
    prefetch(dy + i, ahead, k);
    const Vec v = get(x + i, lanes), d = get(dy + i, lanes);
    const Vec u = Center ? v - means : v;
    if (dx) {
      // g is rounded as it was in the sums: what cancels, cancels exactly
      Vec out = d * get(w + i, lanes);
      if (Center) out = out + level;
      out = fma_once(u, pulls, out);
      out = dh ? fma(out, scales, get(dh + i, lanes)) : out * scales;
      put<Stream>(dx + i, out, lanes);
    }
    if (Params) {
      const Vec z = Center ? fma(u, scales, lefts) : u * scales;
      put<false>(dw + i, fma(d, z, get(dw + i, lanes)), lanes);
      if (Center) put<false>(db + i, d + get(db + i, lanes), lanes);
    }
  });
}

template <bool Center, bool Params, bool Stream, class T>
inline void norm_backward_rows(const Backward& a, const float* w, float* dw, float* db,
                               i64 from, i64 to) {
  const i64 n = a.cols;
  const double inverse = 1.0 / double(n);
  for (i64 row = from; row < to; ++row) {
    const i64 at = row * n;
    norm_backward_row<Center, Params, Stream>(
        (const T*)a.grad_output + at,
        a.grad_new_residual ? (const T*)a.grad_new_residual + at : nullptr, (const T*)a.input + at,
        w, a.grad_input ? (T*)a.grad_input + at : nullptr, dw, db, n, inverse, a.eps);
  }
  if (Stream) stream_fence();
}

// The rows [from, to) with their sums in dw and db (one after the other, `width` floats): a few rows
// at a time in `run`, so that no sum is a long chain of roundings.
template <bool Center, bool Stream, class T>
inline void norm_backward_sums(const Backward& a, const float* w, float* sums, float* run,
                               i64 width, i64 from, i64 to) {
  constexpr i64 kRun = 16;
  for (i64 at = from; at == from || at < to; at += kRun) {
    float* into = at == from ? sums : run;
    sweep(width, [&](auto lanes, i64 i, int) INLINE_LAMBDA { put<false>(into + i, zero(), lanes); });
    norm_backward_rows<Center, true, Stream, T>(a, w, into, into + a.cols, at,
                                                least(to, at + kRun));
    if (into == run)
      sweep(width, [&](auto lanes, i64 i, int) INLINE_LAMBDA {
        put<false>(sums + i, get(sums + i, lanes) + get(run + i, lanes), lanes);
      });
  }
}

template <bool Center>
inline void norm_backward(const Backward& a) {
  const i64 n = a.cols;
  if (n == 0) return;
  const bool params = a.grad_weight || a.grad_bias;
  // The parts depend on the shape alone, so that the sums do not depend on the threads.
  const i64 parts = most(1, least(64, least(a.rows / 16, a.rows * n / 16384)));
  const i64 per_part = (Center ? 2 : 1) * n;
  const Scratch scratch(n + (params ? 2 * parts * per_part : 0));
  const float* w = prepared(a.weight, a.weight_dtype, n, a.weight_offset, 1.0f, scratch.data());
  float *sums = scratch.data() + n, *runs = sums + parts * per_part;
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const i64 row_bytes = n * i64(sizeof(T)), bytes = a.rows * row_bytes;
    const bool stream = bytes >= kStreamBytes && a.grad_input && aligned(a.grad_input, row_bytes);
    const int threads = useful_threads(2 * bytes, a.threads);
    const i64 tasks =
        params ? parts : most(1, ceil_div(a.rows, rows_per_task(a.rows, bytes, threads)));
    parallel_for(tasks, threads, [&](i64 task) {
      const i64 from = a.rows * task / tasks, to = a.rows * (task + 1) / tasks;
      if (params) {
        float *own = sums + task * per_part, *run = runs + task * per_part;
        stream ? norm_backward_sums<Center, true, T>(a, w, own, run, per_part, from, to)
               : norm_backward_sums<Center, false, T>(a, w, own, run, per_part, from, to);
      } else {
        stream ? norm_backward_rows<Center, false, true, T>(a, w, nullptr, nullptr, from, to)
               : norm_backward_rows<Center, false, false, T>(a, w, nullptr, nullptr, from, to);
      }
    });
  });
  if (params)
    reduce_parts(sums, parts, n, a.weight_dtype, a.grad_weight, a.grad_bias, Center ? 2 : 1,
                 a.threads);
}

void rms_norm_fwd(const Forward& a) { norm_forward<false>(a); }
void layer_norm_fwd(const Forward& a) { norm_forward<true>(a); }
void rms_norm_bwd(const Backward& a) { norm_backward<false>(a); }
void layer_norm_bwd(const Backward& a) { norm_backward<true>(a); }

#include "cpu/kernels/group_norm.inl"

constexpr Kernels table = {rms_norm_fwd,   layer_norm_fwd, rms_norm_bwd,
                           layer_norm_bwd, group_norm_fwd, group_norm_bwd};

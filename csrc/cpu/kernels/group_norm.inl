// GroupNorm over [batch, channels, spatial]: a row is one group of one sample, contiguous, with a
// weight a channel.

// Channels shorter than this are not worth a loop each: their weights are spread to one an element
// instead, and a group becomes a row of LayerNorm.
constexpr i64 kSpread = 32;

INLINE void spread(const float* per_channel, i64 channels, i64 spatial, float* out) {
  for (i64 c = 0; c < channels; ++c)
    for (i64 s = 0; s < spatial; ++s) out[c * spatial + s] = per_channel[c];
}

template <bool Stream, class T>
APART void group_row(const T* x, const float* w, const float* b, T* y, i64 channels, i64 spatial,
                     float eps) {
  const Moments m = moments<false>(x, x, channels * spatial);
  const float mean = float(m.mean), scale = 1.0f / __builtin_sqrtf(float(m.variance) + eps);
  const float left = float(mean - m.mean) * scale;
  const Vec means = set1(mean);
  const i64 ahead = reach<T>(channels * spatial);
  for (i64 c = 0; c < channels; ++c) {
    const Vec scales = set1(scale * w[c]), shift = set1(b[c] + left * w[c]);
    const T* from = x + c * spatial;
    T* to = y + c * spatial;
    sweep(spatial, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
      prefetch(from + i, ahead, k);
      put<Stream>(to + i, fma(get(from + i, lanes) - means, scales, shift), lanes);
    });
  }
}

void group_norm_fwd(const GroupForward& a) {
  const i64 channels = a.channels / a.groups, size = channels * a.spatial,
            rows = a.batch * a.groups;
  if (rows == 0 || size == 0) return;
  const bool small = a.spatial < kSpread;
  const i64 spread_size = small ? a.channels * a.spatial : 0;
  const Scratch scratch(2 * a.channels + 2 * spread_size);
  const float* w = prepared(a.weight, a.weight_dtype, a.channels, 0.0f, 1.0f, scratch.data());
  const float* b =
      prepared(a.bias, a.weight_dtype, a.channels, 0.0f, 0.0f, scratch.data() + a.channels);
  if (small && a.spatial > 1) {
    float* room = scratch.data() + 2 * a.channels;
    spread(w, a.channels, a.spatial, room);
    spread(b, a.channels, a.spatial, room + spread_size);
    w = room;
    b = room + spread_size;
  }
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const i64 bytes = rows * size * i64(sizeof(T));
    const bool stream =
        bytes >= kStreamBytes && aligned(a.output, (small ? size : a.spatial) * i64(sizeof(T)));
    const int threads = useful_threads(bytes, a.threads);
    const i64 step = rows_per_task(rows, bytes, threads);
    parallel_for(ceil_div(rows, step), threads, [&](i64 task) {
      for (i64 row = task * step, end = least(rows, row + step); row < end; ++row) {
        const T* x = (const T*)a.input + row * size;
        T* y = (T*)a.output + row * size;
        const i64 at = row % a.groups * (small ? size : channels);
        if (small)
          stream ? norm_row<true, false, true>(x, x, w + at, b + at, y, y, size, float(a.eps))
                 : norm_row<true, false, false>(x, x, w + at, b + at, y, y, size, float(a.eps));
        else
          stream ? group_row<true>(x, w + at, b + at, y, channels, a.spatial, float(a.eps))
                 : group_row<false>(x, w + at, b + at, y, channels, a.spatial, float(a.eps));
      }
      if (stream) stream_fence();
    });
  });
}

// dw and db receive this group's sums of dy * z and dy, added to what is there; both may be null.
template <bool Stream, class T>
APART void group_backward_row(const T* dy, const T* x, const float* w, T* dx, float* dw, float* db,
                              i64 channels, i64 spatial, double eps) {
  const i64 size = channels * spatial;
  const Moments m = moments<false>(x, x, size);
  const float mean = float(m.mean);
  const double rstd = 1.0 / __builtin_sqrt(m.variance + eps), left = (mean - m.mean) * rstd;
  const Vec means = set1(mean);
  double sum_g = 0, sum_gz = 0;
  for (i64 c = 0; c < channels; ++c) {
    double sum_d = 0, sum_dx = 0;
    for (i64 at = 0; at < spatial; at += kBlock) {
      Vec ds[4] = {zero(), zero(), zero(), zero()}, dxs[4] = {zero(), zero(), zero(), zero()};
      const T *xs = x + c * spatial + at, *dys = dy + c * spatial + at;
      sweep(least(kBlock, spatial - at), [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
        const Vec d = get(dys + i, lanes);
        ds[k] = ds[k] + d;
        dxs[k] = fma(d, get(xs + i, lanes) - means, dxs[k]);
      });
      sum_d += total(ds);
      sum_dx += total(dxs);
    }
    const double sum_dz = rstd * sum_dx + left * sum_d;
    sum_g += w[c] * sum_d;
    sum_gz += w[c] * sum_dz;
    if (dw) {
      dw[c] += float(sum_dz);
      db[c] += float(sum_d);
    }
  }
  if (!dx) return;
  // dx = rstd * (dy * w - mean(g) - z * mean(g * z)), with z = (x - mean) * rstd + left
  const double pull = -sum_gz / double(size), level = -sum_g / double(size) + left * pull;
  const Vec pulls = set1(float(rstd * rstd * pull)), levels = set1(float(rstd * level));
  const i64 ahead = reach<T>(size);
  for (i64 c = 0; c < channels; ++c) {
    const Vec scales = set1(float(rstd * w[c]));
    const T *xs = x + c * spatial, *dys = dy + c * spatial;
    T* out = dx + c * spatial;
    sweep(spatial, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
      prefetch(xs + i, ahead, k);
      prefetch(dys + i, ahead, k);
      const Vec z = get(xs + i, lanes) - means;
      put<Stream>(out + i, fma(z, pulls, fma(get(dys + i, lanes), scales, levels)), lanes);
    });
  }
}

// Sums each channel's elements of [channels, spatial] and writes them as the weight's type.
inline void fold(const float* from, i64 channels, i64 spatial, int dtype, void* out) {
  for (i64 c = 0; c < channels; ++c) {
    double sum = 0;
    for (i64 s = 0; s < spatial; ++s) sum += from[c * spatial + s];
    write_as(dtype, out, c, set1(float(sum)), First{1});
  }
}

void group_norm_bwd(const GroupBackward& a) {
  const i64 channels = a.channels / a.groups, size = channels * a.spatial;
  const bool params = a.grad_weight || a.grad_bias, small = a.spatial < kSpread;
  if (a.channels == 0) return;
  // A task owns one group of a share of the samples; the shares depend on the shape alone.
  const i64 shares = most(1, least(a.batch, ceil_div(64, a.groups)));
  const i64 width = small ? a.channels * a.spatial : a.channels, part = 2 * width;
  const Scratch scratch(a.channels + width + (params ? shares * part : 0) + 2 * width);
  const float* w = prepared(a.weight, a.weight_dtype, a.channels, 0.0f, 1.0f, scratch.data());
  float *room = scratch.data() + a.channels, *sums = room + width,
        *folded = sums + (params ? shares * part : 0);
  if (small && a.spatial > 1) {
    spread(w, a.channels, a.spatial, room);
    w = room;
  }
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const i64 bytes = a.batch * a.groups * size * i64(sizeof(T));
    const bool stream = bytes >= kStreamBytes && a.grad_input &&
                        aligned(a.grad_input, (small ? size : a.spatial) * i64(sizeof(T)));
    const i64 per_group = small ? size : channels;
    parallel_for(shares * a.groups, useful_threads(2 * bytes, a.threads), [&](i64 task) {
      const i64 share = task / a.groups, group = task % a.groups;
      float *dw = nullptr, *db = nullptr;
      if (params) {
        dw = sums + share * part + group * per_group;
        db = dw + width;
        for (i64 i = 0; i < per_group; ++i) dw[i] = db[i] = 0;
      }
      const float* weight = w + group * per_group;
      const i64 end = a.batch * (share + 1) / shares;
      for (i64 sample = a.batch * share / shares; sample < end; ++sample) {
        const i64 at = (sample * a.groups + group) * size;
        const T *dy = (const T*)a.grad_output + at, *x = (const T*)a.input + at;
        T* dx = a.grad_input ? (T*)a.grad_input + at : nullptr;
        if (!small)
          stream ? group_backward_row<true>(dy, x, weight, dx, dw, db, channels, a.spatial, a.eps)
                 : group_backward_row<false>(dy, x, weight, dx, dw, db, channels, a.spatial, a.eps);
        else if (size && params)
          norm_backward_row<true, true, false>(dy, (const T*)nullptr, x, weight, dx, dw, db, size,
                                               a.eps);
        else if (size)
          norm_backward_row<true, false, false>(dy, (const T*)nullptr, x, weight, dx, dw, db, size,
                                                a.eps);
      }
      if (stream) stream_fence();
    });
  });
  if (!params) return;
  if (!small || a.spatial == 1) {
    reduce_parts(sums, shares, width, a.weight_dtype, a.grad_weight, a.grad_bias, 2, a.threads);
    return;
  }
  reduce_parts(sums, shares, width, kFloat32, folded, folded + width, 2, a.threads);
  if (a.grad_weight) fold(folded, a.channels, a.spatial, a.weight_dtype, a.grad_weight);
  if (a.grad_bias) fold(folded + width, a.channels, a.spatial, a.weight_dtype, a.grad_bias);
}

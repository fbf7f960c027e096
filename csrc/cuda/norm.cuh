// RMSNorm and LayerNorm kernels; formulas in norm_math.h and kernels/norm.py.
#pragma once

#include "cuda/norm_math.h"
#include "cuda/norm_params.h"
#include "cuda/vector.cuh"

namespace fastllm {

// A block holds blockDim.y rows in registers, ITEMS vectors a thread. For aligned rows.
template <typename T, bool CENTER, int ITEMS>
__global__ void __launch_bounds__(512) norm_forward(Forward p) {
  constexpr int V = Pack<T>::size;
  RowSum sum(shared_memory, 1, 0);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int vectors = row < p.rows ? p.cols / V : 0;
  const T* x = static_cast<const T*>(p.x) + row * p.cols;
  const T* residual = static_cast<const T*>(p.residual) + row * p.cols;
  Pack<T> h[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    if (v < vectors) h[i] = load_pack(x + v * V);
  }
  if (p.residual) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int v = threadIdx.x + i * blockDim.x;
      if (v >= vectors) continue;
      const Pack<T> r = load_pack(residual + v * V);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        h[i].value[j] = from_float<T>(to_float(h[i].value[j]) + to_float(r.value[j]));
      }
      store_pack(static_cast<T*>(p.h) + row * p.cols + v * V, h[i]);
    }
  }
  float mean = 0.0f;
  if constexpr (CENTER) {
    float total[1] = {0.0f};
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      if (static_cast<int>(threadIdx.x + i * blockDim.x) >= vectors) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) total[0] += to_float(h[i].value[j]);
    }
    sum(total);
    mean = total[0] / static_cast<float>(p.cols);
  }
  float square[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    if (static_cast<int>(threadIdx.x + i * blockDim.x) >= vectors) continue;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float d = to_float(h[i].value[j]) - mean;
      square[0] += d * d;
    }
  }
  sum(square);
  const float rstd = rsqrtf(square[0] / static_cast<float>(p.cols) + p.eps);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    if (v >= vectors) continue;
    float w[V], b[V];
    if (p.weight) load_params<T>(p.weight, p.wide, v * V, w);
    if (p.bias) load_params<T>(p.bias, p.wide, v * V, b);
    Pack<T> y;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float scale = p.weight ? w[j] + p.offset : 1.0f;
      y.value[j] = from_float<T>(
          normalize(to_float(h[i].value[j]), mean, rstd, scale, p.bias ? b[j] : 0.0f));
    }
    store_pack(static_cast<T*>(p.y) + row * p.cols + v * V, y);
  }
}

// x, or x + residual rounded to T.
template <typename T>
__device__ __forceinline__ T load_sum(const Forward& p, int64_t at) {
  const T x = static_cast<const T*>(p.x)[at];
  if (!p.residual) return x;
  return from_float<T>(to_float(x) + to_float(static_cast<const T*>(p.residual)[at]));
}

// Each block owns one row of any length and alignment, and reads it twice.
template <typename T, bool CENTER>
__global__ void __launch_bounds__(512) norm_forward_long(Forward p) {
  RowSum sum(shared_memory, 1, 0);
  const int64_t base = static_cast<int64_t>(blockIdx.x) * p.cols;
  Moments own;
  for (int col = threadIdx.x; col < p.cols; col += blockDim.x) {
    const T h = load_sum<T>(p, base + col);
    if (p.residual) static_cast<T*>(p.h)[base + col] = h;
    if constexpr (CENTER) {
      add_value(own, to_float(h));
    } else {
      own.m2 += to_float(h) * to_float(h);
    }
  }
  float mean = 0.0f;
  if constexpr (CENTER) {
    float total[1] = {own.mean * own.count};
    sum(total);
    mean = total[0] / static_cast<float>(p.cols);
    own.m2 += own.count * (own.mean - mean) * (own.mean - mean);
  }
  float square[1] = {own.m2};
  sum(square);
  const float rstd = rsqrtf(square[0] / static_cast<float>(p.cols) + p.eps);
  for (int col = threadIdx.x; col < p.cols; col += blockDim.x) {
    const float scale = p.weight ? load_param<T>(p.weight, p.wide, col) + p.offset : 1.0f;
    const float bias = p.bias ? load_param<T>(p.bias, p.wide, col) : 0.0f;
    const float x = to_float(load_sum<T>(p, base + col));
    static_cast<T*>(p.y)[base + col] = from_float<T>(normalize(x, mean, rstd, scale, bias));
  }
}

// Cluster k of n (one block, where a row fits one) owns the rows k * blockDim.y + threadIdx.y,
// and every n * blockDim.y further, and row k of the partial sums; each block of a cluster owns a
// stretch of the columns. For aligned rows.
template <typename T, bool CENTER, int ITEMS>
__global__ void __launch_bounds__(512) norm_backward(Backward p) {
  constexpr int V = Pack<T>::size;
  const int rank = blockIdx.x % p.cluster;
  const int64_t first = blockIdx.x / p.cluster, clusters = gridDim.x / p.cluster;
  RowSum sum(shared_memory, p.cluster, rank);
  const int stretch = (p.cols / V + p.cluster - 1) / p.cluster;
  const int start = rank * stretch;
  const int end = min(start + stretch, p.cols / V);
  const float count = static_cast<float>(p.cols);
  const T* hs = static_cast<const T*>(p.h);
  const T* dys = static_cast<const T*>(p.dy);
  constexpr bool AHEAD = sizeof(T) == 2;  // registers for the next rows, too
  float dw[ITEMS][V] = {}, db[ITEMS][V] = {};
  Pack<T> h[ITEMS], dy[ITEMS], next_h[ITEMS], next_dy[ITEMS];
  auto load = [&](int64_t block, Pack<T>(&to_h)[ITEMS], Pack<T>(&to_dy)[ITEMS]) {
    const int64_t row = block * blockDim.y + threadIdx.y;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int v = start + threadIdx.x + i * blockDim.x;
      if (row < p.rows && v < end) {
        to_h[i] = load_pack(hs + row * p.cols + v * V);
        to_dy[i] = load_pack(dys + row * p.cols + v * V);
      }
    }
  };
  if (AHEAD) load(first, h, dy);
  for (int64_t block = first; block * blockDim.y < p.rows; block += clusters) {
    const int64_t row = block * blockDim.y + threadIdx.y;
    const int limit = row < p.rows ? end : start;
    if (AHEAD) {
      load(block + clusters, next_h, next_dy);  // in flight while this row is summed up
    } else {
      load(block, h, dy);
    }
    float mean = 0.0f;
    if constexpr (CENTER) {
      float total[1] = {0.0f};
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) {
        if (static_cast<int>(start + threadIdx.x + i * blockDim.x) >= limit) continue;
#pragma unroll
        for (int j = 0; j < V; ++j) total[0] += to_float(h[i].value[j]);
      }
      sum(total);
      mean = total[0] / count;
    }
    float totals[CENTER ? 3 : 2] = {};  // of d * d, g * d and g, with d = h - mean
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int v = start + threadIdx.x + i * blockDim.x;
      if (v >= limit) continue;
      float w[V];
      if (p.weight) load_params<T>(p.weight, p.wide, v * V, w);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float d = to_float(h[i].value[j]) - mean;
        const float g = to_float(dy[i].value[j]) * (p.weight ? w[j] + p.offset : 1.0f);
        totals[0] += d * d;
        totals[1] += g * d;
        if constexpr (CENTER) totals[2] += g;
      }
    }
    sum(totals);
    const float rstd = rsqrtf(totals[0] / count + p.eps);
    const float along = totals[1] * rstd / count;
    float mean_g = 0.0f;
    if constexpr (CENTER) mean_g = totals[2] / count;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int v = start + threadIdx.x + i * blockDim.x;
      if (v >= limit) continue;
      const int64_t at = row * p.cols + v * V;
      float w[V];
      if (p.weight && p.dx) load_params<T>(p.weight, p.wide, v * V, w);
      Pack<T> dh, dx;
      if (p.dh) dh = load_pack(static_cast<const T*>(p.dh) + at);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float upstream = to_float(dy[i].value[j]);
        const float n = (to_float(h[i].value[j]) - mean) * rstd;
        dw[i][j] += upstream * n;
        db[i][j] += upstream;
        const float g = upstream * (p.weight && p.dx ? w[j] + p.offset : 1.0f);
        const float grad = input_grad(g, n, mean_g, along, rstd);
        dx.value[j] = from_float<T>(grad + (p.dh ? to_float(dh.value[j]) : 0.0f));
      }
      if (p.dx) store_pack(static_cast<T*>(p.dx) + at, dx);
    }
#pragma unroll
    for (int i = 0; i < (AHEAD ? ITEMS : 0); ++i) {
      h[i] = next_h[i];
      dy[i] = next_dy[i];
    }
  }
  // add up the block's rows, one after the other; the slots of the sums are free by now
  float* tile = reinterpret_cast<float*>(shared_memory);
  for (int which = 0; which < 2; ++which) {
    float* out = which == 0 ? p.dw_sums : p.db_sums;
    if (!out) continue;
    for (int y = 0; y < static_cast<int>(blockDim.y); ++y) {
      if (blockDim.y > 1) __syncthreads();
      if (y != static_cast<int>(threadIdx.y)) continue;
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) {
        const int v = start + threadIdx.x + i * blockDim.x;
        if (v >= end) continue;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          float total = which == 0 ? dw[i][j] : db[i][j];
          if (y > 0) total += tile[v * V + j];
          if (y + 1 < static_cast<int>(blockDim.y)) {
            tile[v * V + j] = total;
          } else {
            out[first * p.cols + v * V + j] = total;
          }
        }
      }
    }
  }
}

// Each block owns one row of any length and alignment, and writes its four statistics.
template <typename T, bool CENTER>
__global__ void __launch_bounds__(512) norm_backward_stats(Backward p) {
  RowSum sum(shared_memory, 1, 0);
  const int64_t base = static_cast<int64_t>(blockIdx.x) * p.cols;
  const float count = static_cast<float>(p.cols);
  const T* hs = static_cast<const T*>(p.h) + base;
  const T* dys = static_cast<const T*>(p.dy) + base;
  float mean = 0.0f;
  if constexpr (CENTER) {
    float total[1] = {0.0f};
    for (int col = threadIdx.x; col < p.cols; col += blockDim.x) total[0] += to_float(hs[col]);
    sum(total);
    mean = total[0] / count;
  }
  float totals[CENTER ? 3 : 2] = {};
  for (int col = threadIdx.x; col < p.cols; col += blockDim.x) {
    const float d = to_float(hs[col]) - mean;
    const float scale = p.weight ? load_param<T>(p.weight, p.wide, col) + p.offset : 1.0f;
    const float g = to_float(dys[col]) * scale;
    totals[0] += d * d;
    totals[1] += g * d;
    if constexpr (CENTER) totals[2] += g;
  }
  sum(totals);
  if (threadIdx.x == 0) {
    const float rstd = rsqrtf(totals[0] / count + p.eps);
    float* stats = p.stats + 4 * static_cast<int64_t>(blockIdx.x);
    stats[0] = mean;
    stats[1] = rstd;
    stats[2] = 0.0f;
    if constexpr (CENTER) stats[2] = totals[2] / count;
    stats[3] = totals[1] * rstd / count;
  }
}

// Block (c, p) owns the columns of block c in the rows p, p + P, ..., and row p of the sums.
template <typename T>
__global__ void __launch_bounds__(256) norm_backward_tile(Backward p) {
  const int64_t col = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (col >= p.cols) return;
  const int at_col = static_cast<int>(col);
  const float scale = p.weight ? load_param<T>(p.weight, p.wide, at_col) + p.offset : 1.0f;
  float dw = 0.0f, db = 0.0f;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const float* stats = p.stats + 4 * row;
    const int64_t at = row * p.cols + col;
    const float n = (to_float(static_cast<const T*>(p.h)[at]) - stats[0]) * stats[1];
    const float dy = to_float(static_cast<const T*>(p.dy)[at]);
    dw += dy * n;
    db += dy;
    if (!p.dx) continue;
    float dx = input_grad(dy * scale, n, stats[2], stats[3], stats[1]);
    if (p.dh) dx += to_float(static_cast<const T*>(p.dh)[at]);
    static_cast<T*>(p.dx)[at] = from_float<T>(dx);
  }
  if (p.dw_sums) p.dw_sums[blockIdx.y * static_cast<int64_t>(p.cols) + col] = dw;
  if (p.db_sums) p.db_sums[blockIdx.y * static_cast<int64_t>(p.cols) + col] = db;
}

// Block (c, 0) adds up 32 columns of dw's partial sums, block (c, 1) of db's, in a fixed order.
template <typename T>
__global__ void __launch_bounds__(1024) norm_add_partials(Backward p, int partials) {
  float* tile = reinterpret_cast<float*>(shared_memory);  // [32][33]
  const float* from = blockIdx.y == 0 ? p.dw_sums : p.db_sums;
  void* to = blockIdx.y == 0 ? p.dw : p.db;
  if (!from) return;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float total = 0.0f;
  for (int row = threadIdx.y; row < partials; row += 32) {
    if (col < p.cols) total += from[row * static_cast<int64_t>(p.cols) + col];
  }
  tile[threadIdx.y * 33 + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || col >= p.cols) return;
  for (int y = 1; y < 32; ++y) total += tile[y * 33 + threadIdx.x];
  store_param<T>(to, p.wide, static_cast<int>(col), total);
}

}  // namespace fastllm

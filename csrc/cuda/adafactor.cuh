// Adafactor's kernels: squares by row and column, moments, directions, and how far.
#pragma once

#include "cuda/adafactor.h"
#include "cuda/vector.cuh"

namespace fastllm {

constexpr int kFactorThreads = 256;
constexpr int kFactorRows = 8;  // rows whose sums a thread has in registers

__device__ __forceinline__ float element(int64_t type, const void* from, int64_t at) {
  if (type == 0) return static_cast<const float*>(from)[at];
  if (type == 1) return to_float(static_cast<const __nv_bfloat16*>(from)[at]);
  return to_float(static_cast<const __half*>(from)[at]);
}
// torch's lerp.
__device__ __forceinline__ float blended(float from, float to, float share) {
  return share < 0.5f ? from + share * (to - from) : to - (to - from) * (1.0f - share);
}
__device__ __forceinline__ float share_of_new(const FactorStep& p, const FactorRow& row) {
  return static_cast<float>(pow(static_cast<double>(max(*row.step, 1.0f)), p.beta2_decay));
}
__device__ __forceinline__ bool is_found(const FactorStep& p) {
  return p.found != nullptr && *p.found != 0.0f;
}
// block_sum that may be called again at once.
__device__ __forceinline__ float next_sum(float value) {
  const float sum = block_sum<kFactorThreads>(value);
  __syncthreads();
  return sum;
}

// Each block owns one share of a matrix: its rows' sums, and what they add to each column's.
__global__ void __launch_bounds__(kFactorThreads) factor_squares(FactorStep p) {
  const FactorShare share = p.shares[blockIdx.x];
  const FactorRow& row = p.rows[share.row];
  if (row.col_var == nullptr) return;
  const float factor = *p.factor;
  const int64_t cols = row.cols;
  float* by_col = p.room + row.by_col + (share.matrix * row.parts + share.part) * cols;
  for (int64_t r = share.first; r < share.last; r += kFactorRows) {
    float sums[kFactorRows] = {};
    for (int64_t c = threadIdx.x; c < cols; c += kFactorThreads) {
      float column = r == share.first ? 0.0f : by_col[c];
#pragma unroll
      for (int j = 0; j < kFactorRows; ++j) {
        if (r + j >= share.last) continue;
        const float g =
            factor * element(row.type, row.grad, (share.matrix * row.rows + r + j) * cols + c);
        sums[j] += g * g;
        column += g * g;
      }
      by_col[c] = column;
    }
#pragma unroll
    for (int j = 0; j < kFactorRows; ++j) {
      const float sum = next_sum(sums[j]);
      if (threadIdx.x == 0 && r + j < share.last)
        p.room[row.by_row + share.matrix * row.rows + r + j] = sum;
    }
  }
}

// Each block owns some columns' moments, or all rows' of a matrix; those it leaves over their mean.
__global__ void __launch_bounds__(kFactorThreads) factor_moments(FactorStep p) {
  const FactorShare job = p.moments[blockIdx.x];
  const FactorRow& row = p.rows[job.row];
  const float mix = share_of_new(p, row);
  const bool still = is_found(p);
  if (job.last >= 0) {
    const int64_t c = job.first + threadIdx.x;
    if (c >= job.last || still) return;
    const float* parts = p.room + row.by_col + job.matrix * row.parts * row.cols + c;
    float sum = 0.0f;
    for (int64_t i = 0; i < row.parts; ++i) sum += parts[i * row.cols];
    float& moment = row.col_var[job.matrix * row.cols + c];
    moment = blended(moment, sum / static_cast<float>(row.rows), mix);
    return;
  }
  float* by_row = p.room + row.by_row + job.matrix * row.rows;
  float* moments = row.row_var + job.matrix * row.rows;
  float sum = 0.0f;
  for (int64_t r = threadIdx.x; r < row.rows; r += kFactorThreads) {
    float moment = moments[r];
    const float mean_square = by_row[r] / static_cast<float>(row.cols);
    if (!still) moment = moments[r] = blended(moment, mean_square, mix);
    by_row[r] = moment;
    sum += moment;
  }
  const float mean = next_sum(sum) / static_cast<float>(row.rows);
  const float floor = static_cast<float>(row.floor), least = mean < floor ? floor : mean;
  for (int64_t r = threadIdx.x; r < row.rows; r += kFactorThreads) by_row[r] /= least;
}

// Each block owns one share: the direction there, and the sum of its squares. NaN goes on.
// Four blocks an SM: left alone, ptxas wants eight and spills.
__global__ void __launch_bounds__(kFactorThreads, 4) factor_directions(FactorStep p) {
  const FactorShare share = p.shares[blockIdx.x];
  const FactorRow& row = p.rows[share.row];
  const float factor = *p.factor * p.sign;
  const float floor = static_cast<float>(row.floor * row.floor);
  float* out = p.out + row.out;
  float sum = 0.0f;
  if (row.col_var == nullptr) {
    const float mix = share_of_new(p, row);
    const bool still = is_found(p);
    for (int64_t i = share.first + threadIdx.x; i < share.last; i += kFactorThreads) {
      const float g = factor * element(row.type, row.grad, i);
      float moment = row.row_var[i];
      if (!still) moment = row.row_var[i] = blended(moment, g * g, mix);
      const float u = g / sqrtf(moment < floor ? floor : moment);
      out[i] = u;
      sum += u * u;
    }
  } else {
    const float* by_row = p.room + row.by_row + share.matrix * row.rows;
    const float* by_col = row.col_var + share.matrix * row.cols;
    for (int64_t r = share.first; r < share.last; ++r) {
      const int64_t at = (share.matrix * row.rows + r) * row.cols;
      const float mine = by_row[r];
      for (int64_t c = threadIdx.x; c < row.cols; c += kFactorThreads) {
        const float moment = mine * by_col[c];
        const float u =
            factor * element(row.type, row.grad, at + c) / sqrtf(moment < floor ? floor : moment);
        out[at + c] = u;
        sum += u * u;
      }
    }
  }
  sum = block_sum<kFactorThreads>(sum);
  if (threadIdx.x == 0) p.sums[blockIdx.x] = sum;
}

// Each thread owns a tensor: how far it goes.
__global__ void __launch_bounds__(kFactorThreads) factor_sizes(FactorStep p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFactorThreads + threadIdx.x;
  if (i >= p.row_count) return;
  const FactorRow& row = p.rows[i];
  const double n = static_cast<double>(row.n < 1 ? 1 : row.n);
  double sum = 0.0;
  for (int64_t k = 0; k < row.shares; ++k) sum += p.sums[row.first_share + k];
  const double time = *row.step < 1.0f ? 1.0 : static_cast<double>(*row.step);
  const double length = p.lengths[i] / sqrt(n), rate = 1.0 / sqrt(time);
  const double over = sqrt(sum / n) / p.d;
  p.sizes[i] = static_cast<float>((length < p.least ? p.least : length) *
                                  (rate < p.lr ? rate : p.lr) / (over < 1.0 ? 1.0 : over));
}

}  // namespace fastllm

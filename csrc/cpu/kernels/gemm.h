// The gemm family: what a product is, and the table that every level fills.
#pragma once
#include <cstdint>
#include <utility>

namespace fastllm::gemm {

enum Activation : int { kNone, kGelu, kGeluTanh, kSilu, kRelu, kRelu2 };

// rows x k numbers; one of the two strides (in elements) is 1.
struct Matrix {
  const void* data;
  int64_t row, col, batch;
};

// out = act(scale * a b^T + bias) + residual, or act(a b^T) * (a b2^T); added to out if accumulate.
// Sums in fp32, in an order that depends on m <= kThinRows, n, k and the level, never on threads.
struct Product {
  int dtype, out_dtype;  // of a, b, bias, residual, pre, pre2; of out. Codes are in types.h.
  int64_t batch, m, n, k;
  Matrix a;              // [m, k]
  Matrix b, b2;          // [n, k]; b2.data null: no gated pair
  const void *packed, *packed2;  // what pack() made of b and b2, or null
  const void* bias;              // [n] or null
  const void* residual;          // as out, or null
  void* out;                     // rows of n adjacent elements
  void *pre, *pre2;              // as out, or null: scale * a b^T + bias, and a b2^T
  int64_t out_row, out_batch;
  int activation;
  float scale;
  int accumulate;
  int block_rows;  // of the result, at most, a task; up to kBlockRows, 0: as many
  int threads;
};

// Products side by side: group i owns rows [ends[i - 1], ends[i]) of a and of out, and batch i of b
// and of bias; where these rows are `inner`, group i owns that part of k of both sides, and batch i
// of out.
struct Groups {
  Product each;         // without the size that the groups cut
  const int32_t* ends;  // not decreasing
  int64_t count;
  int inner;
};

// Up to this many rows, b is read where it lies, once, at the speed of memory.
constexpr int64_t kThinRows = 4;

// grad_pre = grad * act'(pre); gated: also grad_up = grad * act(pre), and grad_pre takes * up.
struct ActivationBackward {
  int dtype, activation;
  const void *grad, *pre, *up;
  const void *more_pre, *more_up;  // gradients that arrive there directly, or null
  void *grad_pre, *grad_up;
  int64_t size;
  int threads;
};

// sums[n] = the sum over m rows of x, in the type of x.
struct RowSum {
  int dtype;
  const void* x;
  void* sums;
  int64_t m, n;
  int threads;
};

struct Kernels {
  void (*multiply)(const Product&);
  void (*multiply_groups)(const Groups&);
  int64_t (*packed_bytes)(int dtype, int64_t n, int64_t k);
  void (*pack)(int dtype, const Matrix& b, int64_t n, int64_t k, void* packed, int threads);
  void (*activation_backward)(const ActivationBackward&);
  void (*row_sum)(const RowSum&);
};

// The kernels of the level in use.
const Kernels& kernels();

}  // namespace fastllm::gemm

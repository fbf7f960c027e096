// Arguments of the norm kernels.
#pragma once

#include <stdint.h>

namespace fastllm {

// Pointers may be null where an argument is not given or a result not wanted.
struct Forward {
  const void *x, *residual, *weight, *bias;
  void *y, *h;
  int64_t rows;
  int cols;
  float eps, offset;
  bool wide;  // weight and bias are float32
};

struct Backward {
  const void *dy, *dh, *h, *weight;
  void *dx, *dw, *db;  // dw, db: the final gradients, of the weight's dtype
  float *dw_sums, *db_sums, *stats;
  int64_t rows;
  int cols;
  float eps, offset;
  bool wide;
  int cluster;
};

}  // namespace fastllm

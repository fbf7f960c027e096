// The norm family: arguments of its kernels and the table that every level fills.
#pragma once
#include <cstdint>

namespace fastllm::norm {

// Rows are contiguous and cols long. Pointers that may be null are marked; dtype codes are in
// types.h.
struct Forward {
  int dtype, weight_dtype;
  const void* input;
  const void* residual;  // null: nothing is added
  const void* weight;    // null: ones
  const void* bias;      // null: zeros; ignored by rms_norm
  void* output;
  void* new_residual;  // null when residual is
  int64_t rows, cols;
  double eps;
  float weight_offset;
  int threads;
};

struct Backward {
  int dtype, weight_dtype;
  const void* grad_output;
  const void* grad_new_residual;  // null: no gradient flows there
  const void* input;
  const void* weight;  // null: ones
  void* grad_input;    // this and the next two: null when not needed
  void* grad_weight;
  void* grad_bias;
  int64_t rows, cols;
  double eps;
  float weight_offset;
  int threads;
};

// input is [batch, channels, spatial], contiguous; channels % groups == 0.
struct GroupForward {
  int dtype, weight_dtype;
  const void* input;
  const void* weight;  // null: ones
  const void* bias;    // null: zeros
  void* output;
  int64_t batch, channels, groups, spatial;
  double eps;
  int threads;
};

struct GroupBackward {
  int dtype, weight_dtype;
  const void* grad_output;
  const void* input;
  const void* weight;  // null: ones
  void* grad_input;    // this and the next two: null when not needed
  void* grad_weight;
  void* grad_bias;
  int64_t batch, channels, groups, spatial;
  double eps;
  int threads;
};

struct Kernels {
  void (*rms_norm_fwd)(const Forward&);
  void (*layer_norm_fwd)(const Forward&);
  void (*rms_norm_bwd)(const Backward&);
  void (*layer_norm_bwd)(const Backward&);
  void (*group_norm_fwd)(const GroupForward&);
  void (*group_norm_bwd)(const GroupBackward&);
};

// The kernels of the level in use.
const Kernels& kernels();

}  // namespace fastllm::norm

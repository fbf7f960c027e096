// The arguments of each kernel family and the table of entry points that every level fills.
#pragma once
#include <cstdint>

namespace fastllm {

// Rows are contiguous and cols long. Pointers that may be null are marked; dtype codes are in
// types.h.
struct NormForward {
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

struct NormBackward {
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
  void (*rms_norm_fwd)(const NormForward&);
  void (*layer_norm_fwd)(const NormForward&);
  void (*rms_norm_bwd)(const NormBackward&);
  void (*layer_norm_bwd)(const NormBackward&);
  void (*group_norm_fwd)(const GroupForward&);
  void (*group_norm_bwd)(const GroupBackward&);
};

}  // namespace fastllm

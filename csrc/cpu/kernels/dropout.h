// Dropout with a residual: the arguments, and the table of entry points that every level fills.
#pragma once
#include <cstdint>

namespace fastllm::dropout {

// output = residual + input * (0 or 1 / (1 - p)), n elements of one type. Which are kept follows from
// the seed and an element's place alone.
struct Call {
  int dtype;
  const void* input;
  const void* residual;  // null: there is none
  void* output;
  int64_t n;
  double p;
  int64_t seed;
  int threads;
};

struct Kernels {
  void (*apply)(const Call&);
};

}  // namespace fastllm::dropout

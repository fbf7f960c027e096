// The arguments of the activations and the table of entry points that every level fills.
#pragma once
#include <cstdint>

namespace fastllm::activation {

enum Function : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu2 = 3 };

// f(input), or f(input) * up where there is an up. A row's columns are adjacent, and rows are as
// many elements apart as the strides say; what is written is contiguous.
struct Forward {
  int dtype, function;
  const void* input;
  const void* up;  // null: there is none
  void* output;
  int64_t rows, cols, input_stride, up_stride;
  int threads;
};

struct Backward {
  int dtype, function;
  const void* grad_output;
  const void* input;
  const void* up;    // null: there is none
  void* grad_input;  // this and the next: null when not needed
  void* grad_up;
  int64_t rows, cols, grad_stride, input_stride, up_stride;
  int threads;
};

struct Kernels {
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
};

}  // namespace fastllm::activation

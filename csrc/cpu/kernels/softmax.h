// softmax and log_softmax: arguments of the kernels and the table that every level fills.
#pragma once
#include <cstdint>

namespace fastllm::softmax {

// input [outer, n, inner], contiguous; the distribution runs over n.
struct Forward {
  int dtype;
  const void* input;
  void* output;
  int64_t outer, n, inner;
  bool log;
  int threads;
};

struct Backward {
  int dtype;
  const void* grad_output;
  const void* output;
  void* grad_input;
  int64_t outer, n, inner;
  bool log;
  int threads;
};

struct Kernels {
  void (*softmax_fwd)(const Forward&);
  void (*softmax_bwd)(const Backward&);
};

const Kernels& kernels();

}  // namespace fastllm::softmax

// Embedding: the arguments of its kernels and the table that every level fills.
#pragma once
#include <cstdint>

namespace fastllm::embedding {

// output[i] = weight[input[i]]: count rows of row_bytes each, weight's rows weight_step bytes apart.
struct Gather {
  int wide;  // indices are int64, else int32
  const void* input;
  const void* weight;
  void* output;
  int64_t count, row_bytes, weight_step;
  int threads;
};

// grad_weight [rows, cols] from grad_output [count, cols], both contiguous.
struct Scatter {
  int dtype, wide;
  const void* grad_output;
  const void* input;
  void* grad_weight;
  int64_t* room;  // rows + 1 + count
  int64_t count, rows, cols, padding_idx;  // padding_idx < 0: none
  int scale_grad_by_freq;
  int threads;
};

struct Kernels {
  void (*gather)(const Gather&);
  void (*scatter)(const Scatter&);
};

}  // namespace fastllm::embedding

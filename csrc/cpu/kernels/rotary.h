// Rotary position embedding: the arguments of the kernel and the table that every level fills.
#pragma once
#include <cstdint>

namespace fastllm::rotary {

// input and output are [batch, heads, length, dim] with strides in elements and adjacent columns;
// they may be the same memory with the same strides. Tables are [length, width], one or one a batch
// (table_batch elements apart), width being rotary_dim, or half of it: then each value serves both
// elements of a pair. Columns from rotary_dim on are passed through.
struct Rotate {
  int dtype, table_dtype;
  const void* input;
  void* output;
  const void* cos;
  const void* sin;
  int64_t batch, heads, length, dim, rotary_dim, width, table_batch;
  int64_t in_batch, in_head, in_row, out_batch, out_head, out_row;
  int interleaved, transposed;  // transposed: the gradient of the rotation
  int threads;
};

struct Kernels {
  void (*rotate)(const Rotate&);
};

}  // namespace fastllm::rotary

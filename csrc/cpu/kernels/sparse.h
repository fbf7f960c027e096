// The sparse family: linear layers whose weights keep two of every four neighbours (2:4).
#pragma once
#include <cstdint>

namespace fastllm::sparse {

constexpr int kInt8 = 3;  // beside the types of types.h

// [n, k] as [n][2 ceil(k / 4)] kept numbers of `dtype`, in order, and [n][ceil(k / 8)] bytes whose
// bit j of byte i says that element 8 i + j is kept.
struct Weight {
  int dtype;
  const void* values;
  const uint8_t* kept;
  const float* scales;  // [n], what each row is multiplied with, or null
  int64_t n, k;
};

// out = x w^T + bias, [m, n], for a few tokens; x may be int8 with one scale a token where w is.
struct Product {
  int x_dtype, dtype;  // of x; of bias and out
  const void* x;       // m rows of k adjacent numbers
  const float* x_scales;
  int64_t m, x_row;
  Weight w;
  const void* bias;  // [n] or null
  void* out;         // m rows of n adjacent numbers
  int threads;
};

// All of w as [n][k] numbers of its own type, zeros included, scales left out.
struct Expand {
  Weight w;
  void* out;
  int threads;
};

struct Kernels {
  void (*multiply)(const Product&);
  void (*expand)(const Expand&);
};

// The kernels of the level in use.
const Kernels& kernels();

}  // namespace fastllm::sparse

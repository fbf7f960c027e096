// The qgemm family: linear layers whose weights are codes, read where a state_dict keeps them.
#pragma once
#include <cstdint>
#include <utility>

#include "cpu/kernels/gemm.h"

namespace fastllm::qgemm {

// What a code stands for: fastllm/ops/quant/layout.py's KINDS.
enum Kind : int { kInt8, kInt4, kNf4, kFp4, kE4M3, kE5M2, kMxFp8 };
// Scales and zeros: the types of types.h, and bytes that are exponents of two.
enum ScaleType : int { kScaleFloat32, kScaleBFloat16, kScaleFloat16, kScaleE8M0 };
// What becomes of the activations: kept, or rounded to int8 with a scale a token, found or given.
enum Activations : int { kFloat, kDynamic, kStatic };

// [n, k]: rows of codes, two in a byte where they have four bits, the even one low.
struct Weight {
  int kind;
  const uint8_t* codes;
  int64_t n, k, row;  // row: bytes from one row to the next
  const void *scales, *zeros;  // zeros null: none, and 8 for int4
  int scale_type;
  // The scale of element (i, j) is scales[i / scale_block * scale_row + j / group]; group 0: / k.
  int64_t scale_row, scale_block, group;
};

// out = activation(x w^T + bias), [m, n]; sums in fp32 (int32 for int8 activations), rounded once.
struct Product {
  int dtype, activations;  // dtype of x, bias and out: types.h
  const void* x;           // m rows of k adjacent numbers
  int64_t m, x_row;
  Weight w;
  const void* bias;  // [n] or null
  float act_scale;   // of all tokens, for kStatic
  int activation;    // gemm.h's
  void* out;         // m rows of n adjacent numbers
  int threads;
};

// The numbers that rows [from, from + rows) of a weight stand for, in the type of types.h.
struct Decode {
  Weight w;
  int dtype;
  int64_t from, rows;
  void* out;  // rows of k adjacent numbers
  int threads;
};

// places = {count, the columns of x with a magnitude above `limit` or NaN, in order}.
struct Loud {
  const void* x;  // m rows of k adjacent numbers of `size` bytes, 2 or 4
  int size;
  int64_t m, k, x_row;
  int64_t limit;    // the bits of a positive number of that type
  int64_t* places;  // [1 + k]
  int threads;
};

struct Kernels {
  void (*multiply)(const Product&);
  void (*decode)(const Decode&);
  void (*loud)(const Loud&);
};

// The kernels of the level in use.
const Kernels& kernels();

}  // namespace fastllm::qgemm

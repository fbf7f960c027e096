// What the kernels on codes take: fastllm/ops/quant/layout.py's formats of 4 and 8 bits.
#pragma once

#include <stdint.h>

namespace fastllm {

enum QuantKind : int { kQuantInt8, kQuantInt4, kQuantNf4, kQuantFp4 };

// [n, k]: rows of codes of `row` bytes, 16-byte aligned; k is a multiple of 32. The scale of element
// (i, j) is scales[i * scale_row + j / group]; group: a multiple of 32, k for whole rows.
struct QuantWeight {
  int kind;
  const void* codes;
  int64_t n, k, row;
  const void *scales, *zeros;  // zeros null: none, and 8 for int4
  int scale_type;              // dtype codes 0 float32, 1 bfloat16, 2 float16
  int64_t scale_row, group;
  const float* table;  // [16], what codes of nf4 and fp4 stand for
};

// out = x w^T + bias, [m, n]; sums in fp32.
struct QuantProduct {
  const void* x;  // m rows of k adjacent numbers, 16-byte aligned
  int64_t m, x_row;
  QuantWeight w;
  const void* bias;  // [n] or null
  void* out;
};

constexpr int kQuantStep = 8;  // neighbours that quantize takes at a time

// x [rows, k] of adjacent numbers to codes; k and group (k for whole rows) are multiples of
// kQuantStep. The last group of a row may be short.
struct Quantize {
  int kind;
  const void* x;  // 16-byte aligned, as codes are
  int64_t rows, k, group;
  void *codes, *scales, *zeros;  // bfloat16 scales and zeros for int4, else float32; zeros or null
  float thresholds[15];          // between the numbers of nf4 and fp4 by size
  uint64_t order;                // their codes, a nibble each
};

}  // namespace fastllm

// quantize and dequantize: arguments of the kernels and the table that every level fills.
#pragma once
#include <cstdint>
#include <utility>

namespace fastllm::quant {

// As in fastllm/ops/quant/layout.py.
enum Kind : int { kInt8, kInt4, kNf4, kFp4, kE4m3, kE5m2, kMxfp8 };

// What scales are stored in: a DType, or e8m0 bytes.
enum ScaleType : int { kE8m0 = 3 };

// Values [rows, cols] lie in row-major order; codes [rows, cols] bytes or [rows, ceil(cols / 2)].
// group > 0: neighbours that share a scale; 0: a row; -1: everything; -b: blocks of b x b of each
// [height, cols] part, height a divisor of rows. 4-bit codes have even groups and blocks.
struct Shape {
  int64_t rows, cols, group, height;
};

// zeros: not null where codes lie between the smallest and the largest value (int4).
struct Quantize {
  int dtype, kind;
  const void* input;
  void *codes, *scales, *zeros;
  Shape shape;
  int threads;
};

// What codes stand for in place of the codes, in the type of the input. scale_type: of the scales,
// which are given; -1: they are made, and written. zeros as in Quantize.
struct Fake {
  Quantize as;  // codes: the values
  int scale_type;
};

// Codes with scales that are given, in the type of `as.scales`: those are a copy of them, in which
// groups that hold NaN or infinity become NaN.
struct Encode {
  Quantize as;
  int scale_type;
  const void* given;
};

// From the gradient of values to that of the input, which stops outside of the range, and to
// parts [rows, groups in a row] of that of given scales.
struct FakeGrad {
  int dtype, kind, scale_type;
  const void *input, *scales, *grad;
  void* grad_input;
  float* parts;
  Shape shape;
  int threads;
};

// zeros: null where there are none; of the scales' type.
struct Dequantize {
  int dtype, kind, scale_type;
  const void *codes, *scales, *zeros;
  void* output;
  Shape shape;
  int threads;
};

struct Kernels {
  void (*quantize)(const Quantize&);
  void (*dequantize)(const Dequantize&);
  void (*encode)(const Encode&);
  void (*fake)(const Fake&);
  void (*fake_grad)(const FakeGrad&);
};

const Kernels& kernels();

}  // namespace fastllm::quant

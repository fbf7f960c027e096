// The optimizer family: one call updates every tensor of an optimizer.
#pragma once
#include <cstdint>

namespace fastllm::optim {

enum Kind : int { kAdam = 0, kSgd = 1, kLion = 2 };

// How a state is kept. The first three are the codes of types.h, one value an element; the others
// are 8-bit codes with one float32 scale for kScaled elements, the largest magnitude among them.
enum Store : int {
  kPlain = 0,       // float32
  kHalf = 1,        // bfloat16, rounded stochastically
  kSignedOctaves = 3,  // uint8, a sign and 16 octaves of 8 steps: optim_codes.inl
  kOctaves = 4,        // int8, 32 octaves of 8 steps
  kFp8 = 5,         // float8_e4m3fn: x = c / 448 * scale
  kFp8Square = 6,   // float8_e4m3fn: x = (c / 448)^2 * scale
};
constexpr int64_t kScaled = 128;

// What one tensor's update needs beside its memory, worked out in double.
struct Coefficients {
  float grad;        // gradients are multiplied by this: 1 / loss scale, clipping, the sign
  float l2;          // weight decay added to the gradient
  float decay;       // the parameter's own factor, 1 - lr * weight decay
  float step;        // Adam: lr / (1 - beta1^t); SGD, Lion: lr
  float mix1, keep2, mix2;  // Adam: 1 - beta1, beta2, 1 - beta2; Lion: 1 - beta1, -, 1 - beta2
  float root;        // Adam: 1 / sqrt(1 - beta2^t)
  float eps;
  float momentum, damp;  // SGD: factors of the old momentum and of the gradient
  bool nesterov;
};

// n elements in the same order in all of the pointers.
struct Tensor {
  int64_t n;
  void* param;
  const void* grad;
  float* master;      // null: the parameter itself is updated
  void* state[3];     // Adam: m, v, max of v or null; SGD: momentum or null; Lion: m
  float* scale[3];    // null where the store has no scales
  int param_type, grad_type, store[3];
  bool stochastic;    // a bfloat16 parameter is rounded stochastically
  uint32_t key;       // of the random numbers of this tensor in this step
  const Coefficients* use;
};

struct Step {
  int kind;
  const Tensor* tensors;
  int64_t count;
  int threads;
};

// A gradient to be measured (sum of squares, largest magnitude) or scaled in place.
struct Gradient {
  int64_t n;
  void* data;
  int type;
};

struct Gradients {
  const Gradient* tensors;
  int64_t count;
  float factor;  // for scale
  int threads;
  double* squares;  // for measure: one for each tensor
  float* largest;   // for measure: one for each tensor, inf or NaN when one is among its elements
};

// A gradient of rows x cols in order, for Adafactor. `out` is of the same layout in float32.
struct Factored {
  int64_t rows, cols;
  const void* grad;
  int type;
  float *by_row, *by_col;
  float floor, factor;
  float* out;
  int threads;
};

struct Kernels {
  void (*step)(const Step&);
  void (*measure)(const Gradients&);
  void (*scale)(const Gradients&);
  void (*factor_squares)(const Factored&);      // writes by_row and by_col
  double (*factor_direction)(const Factored&);  // writes out, returns the sum of its squares
};

// The kernels of the level in use.
const Kernels& kernels();

}  // namespace fastllm::optim

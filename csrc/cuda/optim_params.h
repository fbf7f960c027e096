// Arguments of the optimizer kernels.
#pragma once

#include <stdint.h>

namespace fastllm {

// Along: SGD without states whose lr each tensor multiplies by a number of its own, scale[0]; it does
// not count steps.
constexpr int kOptimAdam = 0, kOptimSgd = 1, kOptimLion = 2, kOptimAlong = 3;

// How a state is kept: as in csrc/cpu/kernels/optim.h.
constexpr int kPlain = 0, kHalf = 1, kSignedOctaves = 3, kOctaves = 4, kFp8 = 5, kFp8Square = 6;

constexpr int64_t kScaled = 128;       // elements that share a scale
constexpr int64_t kOptimPiece = 16384;  // elements of a block of threads
constexpr int kOptimGroups = 32;        // parameter groups that one launch has settings for

// One tensor: a line of the table in device memory, fields of 8 bytes. Elements lie in the same
// order in all of the pointers.
struct OptimRow {
  void* param;
  const void* grad;
  float* master;    // null: the parameter itself is updated
  void* state[3];   // Adam: m, v, max of v or null; SGD: momentum or null; Lion: m
  float* scale[2];  // of the states' blocks; null where the store has none
  float* step;      // how many steps were made; null: not counted
  int64_t n;
  int64_t types;   // a byte each: parameter, gradient (0 fp32, 1 bf16, 2 fp16), three stores, whether
                   // all pointers are multiples of 16
  int64_t number;  // of the tensor in its optimizer, for its random numbers
  int64_t group;   // place in the settings
  int64_t fresh;   // SGD's first step
};

// One parameter group's settings.
struct OptimSettings {
  double lr, one, two, eps, weight_decay;
  const float* lr_at;  // the learning rate on the device, or null
  float sign;          // -1 to maximize
  uint32_t seed;
  bool decoupled, nesterov, stochastic;
};

// What one tensor's update needs beside its memory: fastllm::optim::Coefficients, and more.
struct OptimUse {
  float grad, l2, decay, step, mix1, keep2, mix2, root, eps, momentum, damp;
  uint32_t key;
  bool nesterov, stochastic;
};

// Which elements a block of threads has.
struct OptimShare {
  int64_t row, first;
};

static_assert(sizeof(OptimRow) == 14 * 8 && sizeof(OptimSettings) == 64, "as Python packs them");

struct OptimStep {
  const OptimRow* rows;
  const OptimShare* shares;
  int64_t row_count, share_count;
  OptimUse* uses;       // one a row
  float* squares;       // one a share; null: nothing is clipped
  const float* scale;   // the loss scale, or null
  const float* found;   // not 0: nothing changes; or null
  float* norm;          // receives the norm of the unscaled gradients, where there is clipping
  float max_norm;
};

}  // namespace fastllm

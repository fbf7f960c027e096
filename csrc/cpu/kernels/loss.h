// Losses over rows of logits: arguments of the kernels and the table that every level fills.
#pragma once
#include <cstdint>

namespace fastllm::loss {

// s = softcap * tanh(scale * x / softcap), or scale * x where softcap is 0.
struct Logits {
  float scale, softcap;
};

enum Reduction : int { kNone, kMean, kSum };

// Cross entropy of contiguous rows of `cols` logits, with class indices (target) or class
// probabilities (probs, of input's dtype): exactly one of the two is given. Indices are in range.
// With `part` the rows are one of longer ones, from class `first` on, with index targets: forward
// then leaves out what takes the whole row's log-sum-exp (see row_loss).
struct CrossEntropy {
  int dtype;
  const void* input;
  const int64_t* target;
  const void* probs;
  const float* weight;  // of each of the `classes`; null: ones
  int64_t rows, cols;
  bool part;
  int64_t first, classes, ignore_index;
  int reduction;
  float smoothing, z_loss;
  Logits logits;
  int threads;
};

struct CrossEntropyForward {
  CrossEntropy of;
  void* loss;        // of input's dtype: rows values, or one; null: not wanted
  double* losses;    // of each row
  double* lse;       // of each row
  void* grad_input;  // may be input itself; null: not wanted. Not for parts of rows
  double upstream;   // gradient of the reduced loss that grad_input is for
};

struct CrossEntropyBackward {
  CrossEntropy of;
  const double* lse;
  const float* grad_loss;  // rows values, or one
  void* grad_input;        // may be input itself; this and the next: null when not needed
  void* grad_probs;
};

// Divergence between the rows' distributions softmax(student / T) and softmax(teacher / T).
enum Divergence : int { kForwardKL, kReverseKL, kJensenShannon, kTotalVariation };

struct Distill {
  int dtype;
  const void* student;
  const void* teacher;  // of student's dtype
  int64_t rows, cols;
  float inverse_temperature;
  int divergence;
  int threads;
};

struct DistillForward {
  Distill of;
  float* loss;    // rows values
  double* stats;  // rows x 3: both log-sum-exps, and what the gradient subtracts
};

struct DistillBackward {
  Distill of;
  const double* stats;
  const float* grad_loss;  // rows values
  void* grad_student;      // may be student itself
};

struct Kernels {
  void (*cross_entropy_fwd)(const CrossEntropyForward&);
  void (*cross_entropy_bwd)(const CrossEntropyBackward&);
  void (*distill_fwd)(const DistillForward&);
  void (*distill_bwd)(const DistillBackward&);
};

const Kernels& kernels();

}  // namespace fastllm::loss

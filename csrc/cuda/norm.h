// Launchers of the norm kernels: pointers, sizes, a device and its stream. Each returns a
// cudaError_t as an int, 0 when all was launched. dtype codes: 0 float32, 1 bfloat16, 2 float16.
#pragma once

#include <stdint.h>

namespace fastllm {

struct Forward;
struct Backward;

// The partial sums that norm_bwd needs for `rows` x `cols`: rows of [programs, cols] for each
// weight gradient, and statistics.
struct BackwardPlan {
  int64_t programs;  // rows of partial sums
  int64_t stats;     // float32 values
  int cluster;       // blocks a row; 0: rows of any length and alignment
  int items, threads, block_rows;
};

BackwardPlan make_backward_plan(int dtype, int64_t rows, int64_t cols, bool aligned,
                                int processors, bool clusters);

// The plan for a device of this machine.
int plan_backward(int dtype, int64_t rows, int64_t cols, bool aligned, int device,
                  BackwardPlan* plan);

int norm_fwd(bool center, int dtype, const Forward& p, bool aligned, int device, void* stream);
int norm_bwd(bool center, int dtype, const Backward& p, const BackwardPlan& plan, int device,
             void* stream);
const char* error_text(int error);

}  // namespace fastllm

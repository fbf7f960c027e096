// Launchers of the kernels on codes; they return a cudaError_t.
#pragma once

#include "cuda/quant_params.h"

namespace fastllm {

// A few tokens by a weight of codes, which is read once for every four of them.
int quant_gemv(int dtype, const QuantProduct& p, int device, void* stream);

// out [n, k] of `dtype`, 16-byte aligned: what the codes stand for.
int quant_dequantize(int dtype, const QuantWeight& w, void* out, int device, void* stream);

// The codes, scales and zeros of p.
int quantize(int dtype, const Quantize& p, int device, void* stream);

}  // namespace fastllm

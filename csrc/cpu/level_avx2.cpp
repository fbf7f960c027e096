// The avx2 level: every kernel family, compiled for it and kept to this file.
#if defined(__x86_64__)
#include <type_traits>

#include <immintrin.h>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/region.h"
#include "cpu/types.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace fastllm {
namespace {
#include "cpu/simd/avx2.h"

#include "cpu/kernels/common.inl"
#include "cpu/kernels/norm.inl"
#include "cpu/kernels/group_norm.inl"
}  // namespace

const Kernels kernels_avx2 = {rms_norm_fwd,   layer_norm_fwd, rms_norm_bwd,
                              layer_norm_bwd, group_norm_fwd, group_norm_bwd};

}  // namespace fastllm

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// The avx512 level: every kernel family, compiled for it and kept to this file.
#if defined(__x86_64__)
#include <type_traits>

#include <immintrin.h>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/region.h"
#include "cpu/types.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
// GCC 12's own intrinsics headers trip these: they pass undefined registers on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace fastllm {
namespace {
#include "cpu/simd/avx512.h"

#include "cpu/kernels/common.inl"
#include "cpu/kernels/norm.inl"
#include "cpu/kernels/group_norm.inl"
}  // namespace

const Kernels kernels_avx512 = {rms_norm_fwd,   layer_norm_fwd, rms_norm_bwd,
                                layer_norm_bwd, group_norm_fwd, group_norm_bwd};

}  // namespace fastllm

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

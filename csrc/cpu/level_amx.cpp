// The amx level of one kernel family (family.h), kept to this file.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/family.h"
#include FAMILY_HEADER

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
// GCC 12's own intrinsics headers trip these: they pass undefined registers on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8,avx2,fma,f16c")
#endif

namespace fastllm::FAMILY {
namespace {
#include "cpu/simd/amx.h"

#include "cpu/kernels/common.inl"
#include FAMILY_KERNELS
}  // namespace

extern const Kernels amx;
const Kernels amx = table;

}  // namespace fastllm::FAMILY

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

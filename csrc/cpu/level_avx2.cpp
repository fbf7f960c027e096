// The avx2 level of one kernel family (family.h), kept to this file.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/family.h"
#include FAMILY_HEADER

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace fastllm::FAMILY {
namespace {
#include "cpu/simd/avx2.h"

#include "cpu/kernels/common.inl"
#include FAMILY_KERNELS
}  // namespace

extern const Kernels avx2;
const Kernels avx2 = table;

}  // namespace fastllm::FAMILY

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

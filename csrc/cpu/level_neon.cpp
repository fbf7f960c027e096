// The neon level of one kernel family (family.h), kept to this file.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "cpu/family.h"
#include FAMILY_HEADER

namespace fastllm::FAMILY {
namespace {
#include "cpu/simd/neon.h"

#include "cpu/kernels/common.inl"
#include FAMILY_KERNELS
}  // namespace

extern const Kernels neon;
const Kernels neon = table;

}  // namespace fastllm::FAMILY
#endif

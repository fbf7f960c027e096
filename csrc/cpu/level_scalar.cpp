// The scalar level of one kernel family (family.h), kept to this file.
#include "cpu/family.h"
#include FAMILY_HEADER

namespace fastllm::FAMILY {
namespace {
#include "cpu/simd/scalar.h"

#include "cpu/kernels/common.inl"
#include FAMILY_KERNELS
}  // namespace

extern const Kernels scalar;
const Kernels scalar = table;

}  // namespace fastllm::FAMILY

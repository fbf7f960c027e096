// The neon level: every kernel family, compiled for it and kept to this file.
#if defined(__aarch64__)
#include <type_traits>

#include <arm_neon.h>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/region.h"
#include "cpu/types.h"

namespace fastllm {
namespace {
#include "cpu/simd/neon.h"

#include "cpu/kernels/common.inl"
#include "cpu/kernels/norm.inl"
#include "cpu/kernels/group_norm.inl"
}  // namespace

const Kernels kernels_neon = {rms_norm_fwd,   layer_norm_fwd, rms_norm_bwd,
                              layer_norm_bwd, group_norm_fwd, group_norm_bwd};

}  // namespace fastllm
#endif

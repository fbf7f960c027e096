// What this CPU can run, and which level of the kernels is in use.
#pragma once
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fastllm {

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

// The levels that were compiled in and that this CPU and its system can run, best last.
std::vector<std::string> isa_levels();

// The level in use. Starts as FASTLLM_CPU_ISA says, else as the best one.
std::string isa();

// Throws std::invalid_argument for a level that is unknown or that cannot run here.
void set_isa(const std::string& name);

// Picks the first level; throws as set_isa does when FASTLLM_CPU_ISA asks for a level that cannot
// run.
void init_isa();

// The entry points of the level in use.
const Kernels& kernels();

}  // namespace fastllm

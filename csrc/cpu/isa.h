// What this CPU can run, and which level of the kernels is in use.
#pragma once
#include <string>
#include <vector>

namespace fastllm {

// In the order of the tables that FASTLLM_LEVELS makes.
enum Level : int { kScalar, kAvx2, kAvx512, kNeon, kAvx512Bf16, kAmx };

// The levels that were compiled in and that this CPU and its system can run, best last.
std::vector<std::string> isa_levels();

// The level in use. Starts as FASTLLM_CPU_ISA says, else as the best one.
std::string isa();

// Throws std::invalid_argument for a level that is unknown or that cannot run here.
void set_isa(const std::string& name);

// Picks the first level; throws as set_isa does when FASTLLM_CPU_ISA asks for a level that cannot
// run.
void init_isa();

// The level in use.
Level level();

}  // namespace fastllm

// Defines kernels() of a family inside its namespace: the table of the level in use. Most families
// gain nothing from dot products and tiles of bf16 and use their avx512 kernels there; those with
// FASTLLM_DOT_LEVELS are named in setup.py, too.
#if defined(__x86_64__)
#define FASTLLM_LEVELS                                                                   \
  extern const Kernels scalar, avx2, avx512;                                             \
  const Kernels& kernels() {                                                             \
    static constexpr const Kernels* all[] = {&scalar, &avx2, &avx512, nullptr, &avx512,  \
                                             &avx512};                                   \
    return *all[level()];                                                                \
  }
#define FASTLLM_DOT_LEVELS                                                                   \
  extern const Kernels scalar, avx2, avx512, avx512_bf16, amx;                               \
  const Kernels& kernels() {                                                                 \
    static constexpr const Kernels* all[] = {&scalar, &avx2, &avx512, nullptr, &avx512_bf16, \
                                             &amx};                                          \
    return *all[level()];                                                                    \
  }
#elif defined(__aarch64__)
#define FASTLLM_LEVELS                                                           \
  extern const Kernels scalar, neon;                                             \
  const Kernels& kernels() {                                                     \
    static constexpr const Kernels* all[] = {&scalar, nullptr, nullptr, &neon}; \
    return *all[level()];                                                        \
  }
#define FASTLLM_DOT_LEVELS FASTLLM_LEVELS
#else
#define FASTLLM_LEVELS         \
  extern const Kernels scalar; \
  const Kernels& kernels() { return scalar; }
#define FASTLLM_DOT_LEVELS FASTLLM_LEVELS
#endif

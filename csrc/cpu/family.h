// What a level_*.cpp compiles: setup.py builds each once for every family, with -DFAMILY=<name>.
//
// A family is csrc/cpu/kernels/<name>.h (namespace fastllm::<name>: argument structs, `struct Kernels`
// of function pointers, `kernels()`) and <name>.inl, which ends in `constexpr Kernels table`.
#pragma once
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/region.h"
#include "cpu/types.h"

#define FASTLLM_STRING_(...) #__VA_ARGS__
#define FASTLLM_STRING(...) FASTLLM_STRING_(__VA_ARGS__)
#define FAMILY_HEADER FASTLLM_STRING(cpu/kernels/FAMILY.h)
#define FAMILY_KERNELS FASTLLM_STRING(cpu/kernels/FAMILY.inl)

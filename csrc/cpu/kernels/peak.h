// Multiply-adds on registers alone: what arithmetic on a type can reach at most.
#pragma once
#include <cstdint>

namespace fastllm::peak {

struct Kernels {
  // Does `rounds` of them on each thread; returns the operations of all threads together.
  int64_t (*run)(int dtype, int64_t rounds, int threads);
};

const Kernels& kernels();

}  // namespace fastllm::peak

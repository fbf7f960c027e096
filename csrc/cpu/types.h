// Element types as they lie in memory, and the codes that Python passes for them.
#pragma once
#include <cstdint>

namespace fastllm {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace fastllm

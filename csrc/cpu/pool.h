// Memory for large outputs: 2 MiB-aligned blocks on huge pages, reused instead of unmapped. A block
// is lent out inside a DLPack tensor and comes back when that tensor's storage dies, on whatever
// thread that happens.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastllm {

struct PoolStats {
  int64_t limit;       // most bytes that may lie idle
  int64_t idle_bytes;  // held, waiting for the next tensor
  int64_t idle_blocks;
  int64_t live_bytes;  // lent to tensors
  int64_t live_blocks;
  int64_t reused;     // requests served by an idle block
  int64_t allocated;  // requests that needed new memory
};

struct LentTensor;  // a DLManagedTensor

// A contiguous CPU tensor of uninitialized memory; type_code and bits are DLPack's. Throws
// std::bad_alloc.
LentTensor* pool_lend(int type_code, int bits, const int64_t* shape, int dims);

// Gives the memory back; for a tensor that nobody took over.
void pool_return(LentTensor* tensor);

// Sets how many bytes may lie idle and frees what is above; 0 keeps nothing.
void pool_set_limit(int64_t bytes);

// Frees all idle blocks.
void pool_empty();

PoolStats pool_stats();

}  // namespace fastllm

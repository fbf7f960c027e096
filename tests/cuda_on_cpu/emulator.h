// Runs CUDA kernels on the CPU: each thread of a cluster is a fiber that runs until it has to wait
// at a barrier. Slow, exact in its order of additions, and enough to prove indices, barriers and
// reductions of a kernel on a machine without a GPU.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define FASTLLM_CUDA_ON_CPU
// CUDA's headers first: what they mean by __device__ is redefined below
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace emulated {

struct Barrier {
  int waiting = 0, generation = 0;
};
struct Warp {
  Barrier barrier;
  float value[32];
};
struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  uint3 index;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint3 thread;
  Block* block;
  int linear;
  bool done = false;
};

inline std::vector<Block> blocks;  // of the cluster that runs
inline std::vector<Fiber> fibers;
inline Fiber* current;
inline ucontext_t scheduler;
inline Barrier cluster_barrier;
inline dim3 block_size, grid_size;
inline std::function<void()> body;
inline long progress;

inline void wait(Barrier& barrier, int count) {
  const int generation = barrier.generation;
  if (++barrier.waiting == count) {
    barrier.waiting = 0;
    ++barrier.generation;
    ++progress;
    return;
  }
  while (barrier.generation == generation) swapcontext(&current->context, &scheduler);
}

inline int threads() { return static_cast<int>(block_size.x * block_size.y * block_size.z); }
inline Warp& warp() { return current->block->warps[current->linear / 32]; }

inline float shuffle_xor(float value, int mask) {
  Warp& own = warp();
  const int lane = current->linear % 32;
  own.value[lane] = value;
  wait(own.barrier, 32);
  const float other = own.value[lane ^ mask];
  wait(own.barrier, 32);
  return other;
}

inline int32_t shuffle_xor(int32_t value, int mask) {
  float bits;
  std::memcpy(&bits, &value, 4);
  bits = shuffle_xor(bits, mask);
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void entry() {
  body();
  current->done = true;
  ++progress;
  swapcontext(&current->context, &scheduler);
}

template <typename Kernel, typename... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, int shared, int cluster, Args... args) {
  block_size = block;
  grid_size = grid;
  body = [=] { kernel(args...); };
  if (threads() % 32 != 0) throw std::runtime_error("threads: expected whole warps");
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; x += static_cast<unsigned>(cluster)) {
      blocks = std::vector<Block>(static_cast<size_t>(cluster));
      fibers = std::vector<Fiber>(static_cast<size_t>(cluster * threads()));
      cluster_barrier = {};
      for (int b = 0; b < cluster; ++b) {
        blocks[b].warps.resize(static_cast<size_t>(threads() / 32));
        blocks[b].shared.assign(static_cast<size_t>(shared) + 16, 0xff);  // NaN
        blocks[b].index = {x + static_cast<unsigned>(b), y, 0};
        for (int t = 0; t < threads(); ++t) {
          Fiber& f = fibers[b * threads() + t];
          f.stack.reset(new char[48 * 1024]);
          f.thread = {t % block.x, t / block.x % block.y, 0};
          f.block = &blocks[b];
          f.linear = t;
          getcontext(&f.context);
          f.context.uc_stack.ss_sp = f.stack.get();
          f.context.uc_stack.ss_size = 48 * 1024;
          f.context.uc_link = nullptr;
          makecontext(&f.context, entry, 0);
        }
      }
      for (size_t done = 0; done < fibers.size();) {
        done = 0;
        const long before = progress;
        for (Fiber& f : fibers) {
          if (!f.done) {
            current = &f;
            swapcontext(&scheduler, &f.context);
          }
          done += f.done;
        }
        if (progress == before && done < fibers.size()) throw std::runtime_error("deadlock");
      }
    }
  }
}

}  // namespace emulated

#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::current->block->index)
#define blockDim (emulated::block_size)
#define gridDim (emulated::grid_size)
#define __shfl_xor_sync(mask, value, step) emulated::shuffle_xor(value, step)
#define __syncthreads() \
  emulated::wait(emulated::current->block->barrier, emulated::threads())
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define FASTLLM_SHARED_MEMORY (emulated::current->block->shared.data())

namespace fastllm {
template <typename T>
T* emulated_peer(T* own, int block) {
  unsigned char* base = emulated::current->block->shared.data();
  return reinterpret_cast<T*>(emulated::blocks[block].shared.data() +
                              (reinterpret_cast<unsigned char*>(own) - base));
}
inline void emulated_cluster_barrier() {
  emulated::wait(emulated::cluster_barrier,
                 emulated::threads() * static_cast<int>(emulated::blocks.size()));
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::max;
using std::min;
}  // namespace fastllm

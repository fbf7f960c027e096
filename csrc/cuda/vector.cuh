// 16-byte vectors, dtypes, and sums over the threads of a row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#ifndef FASTLLM_CUDA_ON_CPU  // the tests run these kernels on the host, with their own primitives
#include <cooperative_groups.h>
#endif

namespace fastllm {

#ifdef FASTLLM_CUDA_ON_CPU
#define shared_memory FASTLLM_SHARED_MEMORY
#else
extern __shared__ __align__(16) unsigned char shared_memory[];  // what a launch asked for
#endif

template <typename T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T value[size];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* at) {
  return *reinterpret_cast<const Pack<T>*>(at);
}
template <typename T>
__device__ __forceinline__ void store_pack(T* at, const Pack<T>& pack) {
  *reinterpret_cast<Pack<T>*>(at) = pack;
}

// Weights are of the input's dtype T or float32 (wide).
template <typename T>
__device__ __forceinline__ float load_param(const void* params, bool wide, int col) {
  return wide ? static_cast<const float*>(params)[col]
              : to_float(static_cast<const T*>(params)[col]);
}
template <typename T>
__device__ __forceinline__ void store_param(void* params, bool wide, int col, float x) {
  if (wide) {
    static_cast<float*>(params)[col] = x;
  } else {
    static_cast<T*>(params)[col] = from_float<T>(x);
  }
}

// Pack<T>::size parameters from column `col`, which is a multiple of that size.
template <typename T>
__device__ __forceinline__ void load_params(const void* params, bool wide, int col,
                                            float (&out)[Pack<T>::size]) {
  if (wide) {
#pragma unroll
    for (int j = 0; j < Pack<T>::size; j += 4) {
      const Pack<float> four = load_pack(static_cast<const float*>(params) + col + j);
#pragma unroll
      for (int k = 0; k < 4; ++k) out[j + k] = four.value[k];
    }
  } else {
    const Pack<T> pack = load_pack(static_cast<const T*>(params) + col);
#pragma unroll
    for (int j = 0; j < Pack<T>::size; ++j) out[j] = to_float(pack.value[j]);
  }
}

// Sums over the threads of a row: threadIdx.x of one threadIdx.y, in each block of the cluster.
// Slots in shared memory alternate, so that one barrier a sum is enough; every thread of the
// block has to take part. The order of additions is fixed.
template <int N>
struct Slot {
  float value[N];
};

class RowSum {
 public:
  static constexpr int MAX = 3;  // values added up together
  __device__ RowSum(void* shared, int cluster, int rank)
      : slots_(static_cast<Slot<MAX>*>(shared)), cluster_(cluster), rank_(rank), turn_(0) {
    cluster_barrier();
  }

  // Slots for blocks of `rows` x `warps` warps in a cluster.
  static __host__ __device__ int bytes(int rows, int warps, int cluster) {
    return 2 * rows * warps * cluster * static_cast<int>(sizeof(Slot<MAX>));
  }

  template <int N>
  __device__ __forceinline__ void operator()(float (&values)[N]) {
    static_assert(N <= MAX, "more values than a slot holds");
    warp_sum(values);
    const int warps = static_cast<int>(blockDim.x) / 32;
    const int count = warps * cluster_;
    if (count == 1) return;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    Slot<MAX>* own = slots_ + (turn_ * static_cast<int>(blockDim.y) + static_cast<int>(threadIdx.y)) * count;
    turn_ ^= 1;
    if (lane == 0) {
      const int at = rank_ * warps + static_cast<int>(threadIdx.x) / 32;
      for (int block = 0; block < cluster_; ++block) {
        Slot<MAX>* slot = peer(own, block) + at;
#pragma unroll
        for (int k = 0; k < N; ++k) slot->value[k] = values[k];
      }
    }
    if (cluster_ == 1) {
      __syncthreads();
    } else {
      cluster_barrier();
    }
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] = 0.0f;
    for (int i = lane; i < count; i += 32) {
#pragma unroll
      for (int k = 0; k < N; ++k) values[k] += own[i].value[k];
    }
    warp_sum(values);
  }

 private:
  template <int N>
  __device__ __forceinline__ void warp_sum(float (&values)[N]) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
#pragma unroll
      for (int k = 0; k < N; ++k) values[k] += __shfl_xor_sync(0xffffffffu, values[k], step);
    }
  }

  // The same slots in another block of the cluster.
  __device__ __forceinline__ Slot<MAX>* peer(Slot<MAX>* own, int block) {
#if defined(FASTLLM_CUDA_ON_CPU)
    return cluster_ == 1 ? own : emulated_peer(own, block);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return cluster_ == 1 ? own : cooperative_groups::this_cluster().map_shared_rank(own, block);
#else
    return own;
#endif
  }

  // Also before the first sum: a block of the cluster has to run before others write to it.
  __device__ __forceinline__ void cluster_barrier() {
    if (cluster_ == 1) return;
#if defined(FASTLLM_CUDA_ON_CPU)
    emulated_cluster_barrier();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#endif
  }

  Slot<MAX>* slots_;
  int cluster_, rank_, turn_;
};

// The sum of a value over the THREADS threads of a block, in a fixed order; every thread has it.
template <int THREADS>
__device__ __forceinline__ float block_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  float* sums = reinterpret_cast<float*>(shared_memory);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < THREADS / 32; ++i) total += sums[i];
  return total;
}

}  // namespace fastllm

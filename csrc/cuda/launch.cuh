// Launching: the device made current and put back, a grid with or without clusters.
#pragma once

#include <cuda_runtime.h>

namespace fastllm {

#ifdef FASTLLM_CUDA_ON_CPU  // the tests run kernels on the host

struct OnDevice {
  explicit OnDevice(int) {}
  cudaError_t error = cudaSuccess;
};

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, int shared, void*, int cluster,
                   Args... args) {
  emulated::launch(kernel, grid, block, shared, cluster, static_cast<Params>(args)...);
  return cudaSuccess;
}

#else

// Makes `device` current for its lifetime; `error` tells whether that worked.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) error = cudaSetDevice(device);
  }
  ~OnDevice() {
    if (error == cudaSuccess && before_ != device_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error;

 private:
  int device_, before_ = 0;
};

// Launches kernel(args...); `cluster` blocks of the grid form a cluster where it is more than 1.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, int shared, void* stream,
                   int cluster, Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute[1];
  attribute[0].id = cudaLaunchAttributeClusterDimension;
  attribute[0].val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute[0].val.clusterDim.y = 1;
  attribute[0].val.clusterDim.z = 1;
  config.attrs = attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

#endif

}  // namespace fastllm

// The part of DLPack 1.3's exchange table that we call: a stable C interface which torch (>= 2.10)
// offers as Tensor.__dlpack_c_exchange_api__. It reads a tensor in tens of nanoseconds, without any
// torch header.
#pragma once
#include <cstdint>

namespace fastllm::dlpack {

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_of_object)(void* object, Tensor* out);  // borrowed; -1 with a Python error set
  void* current_stream;
};

}  // namespace fastllm::dlpack

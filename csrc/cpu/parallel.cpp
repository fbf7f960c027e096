#include "cpu/parallel.h"

#include <omp.h>

#include <atomic>
#include <cstdlib>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fastllm {
namespace {

constexpr int64_t kBytesPerThread = 64 << 10;
constexpr int64_t kKeptFloats = 4 << 20;  // 16 MiB a thread

bool forked = false;

float* allocate(int64_t floats) {
  const size_t bytes = (size_t(floats) * sizeof(float) + 63) / 64 * 64;
  void* p = nullptr;
#if defined(_WIN32)
  p = _aligned_malloc(bytes ? bytes : 64, 64);
#else
  if (posix_memalign(&p, 64, bytes ? bytes : 64) != 0) p = nullptr;
#endif
  if (!p) throw std::bad_alloc();
  return static_cast<float*>(p);
}

void release(float* p) {
#if defined(_WIN32)
  _aligned_free(p);
#else
  std::free(p);
#endif
}

struct Kept {
  float* data = nullptr;
  int64_t floats = 0;
  bool busy = false;
  ~Kept() { release(data); }
};
thread_local Kept kept;

}  // namespace

Scratch::Scratch(int64_t floats) : data_(nullptr), owned_(false) {
  if (floats > kKeptFloats || kept.busy) {
    data_ = allocate(floats);
    owned_ = true;
    return;
  }
  if (kept.floats < floats || !kept.data) {
    release(kept.data);
    kept.data = nullptr;
    kept.floats = 0;
    kept.data = allocate(floats);
    kept.floats = floats;
  }
  kept.busy = true;
  data_ = kept.data;
}

Scratch::~Scratch() {
  if (owned_)
    release(data_);
  else
    kept.busy = false;
}

int useful_threads(int64_t bytes, int threads) {
  const int64_t worth = 1 + bytes / kBytesPerThread;
  return worth < threads ? int(worth) : threads;
}

void run_tasks(int64_t tasks, int threads, void (*body)(const void*, int64_t),
               const void* context) {
  if (tasks < threads) threads = int(tasks);
  if (threads <= 1 || forked || omp_in_parallel()) {
    for (int64_t i = 0; i < tasks; ++i) body(context, i);
    return;
  }
  if (tasks == threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t i = 0; i < tasks; ++i) body(context, i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < tasks; ++i) body(context, i);
}

void guard_fork() {
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
}

}  // namespace fastllm

// The one way into threads: OpenMP's, which are torch's own (its wheel bundles the plain libgomp).
#pragma once
#include <cstdint>

namespace fastllm {

// Calls body(context, i) once for each i of [0, tasks) on at most `threads` threads; returns when
// all are done. With one thread or one task no parallel region is entered. More tasks than threads
// are dealt out as they finish.
void run_tasks(int64_t tasks, int threads, void (*body)(const void*, int64_t), const void* context);

// Threads worth waking for work that moves this many bytes (waking costs as much as moving some 64
// KiB).
int useful_threads(int64_t bytes, int threads);

template <class F>
void parallel_for(int64_t tasks, int threads, const F& body) {
  run_tasks(
      tasks, threads, [](const void* context, int64_t i) { (*static_cast<const F*>(context))(i); },
      &body);
}

// Memory for one call, kept for the next call of the same thread up to a bound; 64-byte aligned,
// not cleared.
class Scratch {
 public:
  explicit Scratch(int64_t floats);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
  bool owned_;
};

// From here on parallel_for stays serial in forked children: their copy of the OpenMP pool has no
// threads.
void guard_fork();

}  // namespace fastllm

#include "cpu/pool.h"

#include <cstdlib>
#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastllm {

// The C structures of the DLPack protocol (unversioned form, dlpack.h), as torch.from_dlpack reads
// them.
struct DLDevice {
  int32_t type, id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

namespace {

struct Block {
  void* data;
  size_t bytes;
};

}  // namespace

struct LentTensor {
  DLManagedTensor managed;  // first: the capsule's pointer is the one to this
  Block block;
  std::vector<int64_t> shape, strides;
};

namespace {

constexpr size_t kPage = 2 << 20;
constexpr int32_t kCpu = 1;

void* map_block(size_t bytes) {
  void* p = nullptr;
#if defined(_WIN32)
  p = _aligned_malloc(bytes, kPage);
#else
  if (posix_memalign(&p, kPage, bytes) != 0) p = nullptr;
#endif
#if defined(MADV_HUGEPAGE)
  if (p) madvise(p, bytes, MADV_HUGEPAGE);  // a wish: without huge pages all works, more slowly
#endif
  return p;
}

void unmap_block(void* p) {
#if defined(_WIN32)
  _aligned_free(p);
#else
  std::free(p);
#endif
}

class Pool {
 public:
  Block take(size_t bytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
    {
      std::lock_guard<std::mutex> hold(lock_);
      const auto fit = best_fit(bytes);
      if (fit != idle_.end()) {
        const Block block = *fit;
        idle_.erase(fit);
        idle_bytes_ -= block.bytes;
        ++reused_;
        count_live(block.bytes, 1);
        return block;
      }
    }
    void* p = map_block(bytes);
    if (!p) {
      release(trim(0));
      p = map_block(bytes);
    }
    if (!p) throw std::bad_alloc();
    std::lock_guard<std::mutex> hold(lock_);
    ++allocated_;
    count_live(bytes, 1);
    return {p, bytes};
  }

  void give(Block block) {
    std::list<Block> node;
    try {
      node.push_back(block);
    } catch (const std::bad_alloc&) {  // a deleter must not throw: the block is let go instead
      unmap_block(block.data);
      std::lock_guard<std::mutex> hold(lock_);
      count_live(block.bytes, -1);
      return;
    }
    {
      std::lock_guard<std::mutex> hold(lock_);
      count_live(block.bytes, -1);
      idle_bytes_ += block.bytes;
      idle_.splice(idle_.end(), node);
    }
    release(trim(-1));
  }

  void set_limit(int64_t bytes) {
    {
      std::lock_guard<std::mutex> hold(lock_);
      limit_ = bytes > 0 ? size_t(bytes) : 0;
    }
    release(trim(-1));
  }

  void empty() { release(trim(0)); }

  PoolStats stats() {
    std::lock_guard<std::mutex> hold(lock_);
    return {int64_t(limit_), int64_t(idle_bytes_), int64_t(idle_.size()),
            live_bytes_,     live_blocks_,         reused_,
            allocated_};
  }

  std::mutex& lock() { return lock_; }

 private:
  // The smallest idle block that is large enough and wastes at most a quarter; among equals the
  // last returned, which may still lie in the caches.
  std::list<Block>::iterator best_fit(size_t bytes) {
    auto best = idle_.end();
    for (auto it = idle_.end(); it != idle_.begin();) {
      --it;
      if (it->bytes < bytes || it->bytes - bytes > bytes / 4) continue;
      if (best == idle_.end() || it->bytes < best->bytes) best = it;
      if (best->bytes == bytes) break;
    }
    return best;
  }

  // Takes the oldest idle blocks out until at most `limit` bytes (-1: the limit that is set) are
  // left.
  std::list<Block> trim(int64_t limit) {
    std::list<Block> out;
    std::lock_guard<std::mutex> hold(lock_);
    const size_t most = limit < 0 ? limit_ : size_t(limit);
    while (idle_bytes_ > most) {
      idle_bytes_ -= idle_.front().bytes;
      out.splice(out.end(), idle_, idle_.begin());
    }
    return out;
  }

  static void release(const std::list<Block>& blocks) {
    for (const Block& block : blocks) unmap_block(block.data);
  }

  void count_live(size_t bytes, int by) {
    live_bytes_ += by * int64_t(bytes);
    live_blocks_ += by;
  }

  std::mutex lock_;
  std::list<Block> idle_;  // oldest first
  size_t idle_bytes_ = 0, limit_ = 0;
  int64_t live_bytes_ = 0, live_blocks_ = 0, reused_ = 0, allocated_ = 0;
};

// Never destroyed: tensors may die after the static objects of the process.
Pool& pool() {
  static Pool* const one = [] {
    Pool* made = new Pool;
#if defined(__unix__) || defined(__APPLE__)
    // A child must not inherit a lock that a thread it does not have was holding.
    pthread_atfork([] { pool().lock().lock(); }, [] { pool().lock().unlock(); },
                   [] { pool().lock().unlock(); });
#endif
    return made;
  }();
  return *one;
}

void take_back(DLManagedTensor* managed) { pool_return(reinterpret_cast<LentTensor*>(managed)); }

}  // namespace

LentTensor* pool_lend(int type_code, int bits, const int64_t* shape, int dims) {
  std::unique_ptr<LentTensor> lent(new LentTensor);
  lent->shape.assign(shape, shape + dims);
  lent->strides.resize(dims);
  // strides, and the size in bytes, which must not wrap around
  size_t bytes = size_t(bits) / 8;
  int64_t count = 1;
  for (int i = dims; i-- > 0;) {
    lent->strides[i] = count;
    if (shape[i] < 0 || __builtin_mul_overflow(count, shape[i], &count) ||
        __builtin_mul_overflow(bytes, size_t(shape[i]), &bytes) || bytes > SIZE_MAX / 4)
      throw std::bad_alloc();
  }
  lent->block = pool().take(bytes);
  lent->managed.tensor = {lent->block.data,
                          {kCpu, 0},
                          dims,
                          {uint8_t(type_code), uint8_t(bits), 1},
                          lent->shape.data(),
                          lent->strides.data(),
                          0};
  lent->managed.context = nullptr;
  lent->managed.deleter = take_back;
  return lent.release();
}

void pool_return(LentTensor* tensor) {
  pool().give(tensor->block);
  delete tensor;
}

void pool_set_limit(int64_t bytes) { pool().set_limit(bytes); }
void pool_empty() { pool().empty(); }
PoolStats pool_stats() { return pool().stats(); }

}  // namespace fastllm

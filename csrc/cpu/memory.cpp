#include "memory.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#include "tensor_checks.h"

// Of torch 2.11, absent in 2.10.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
                int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace fastres::cpu {
namespace {

constexpr int64_t kLine = 64;
constexpr std::align_val_t kAlignment{kLine};
// Below, malloc itself keeps what is freed.
constexpr int64_t kLargeBytes = 1 << 16;

size_t initial_limit() {
  if (const char* value = std::getenv("FASTRES_CPU_KEEP_MB"); value != nullptr && *value != '\0') {
    char* end = nullptr;
    const long long megabytes = std::strtoll(value, &end, 10);
    if (*end != '\0' || megabytes < 0) {
      throw std::runtime_error(
          std::string("FASTRES_CPU_KEEP_MB must be a number of megabytes, got '") + value + "'");
    }
    return static_cast<size_t>(megabytes) << 20;
  }
  const auto pages = static_cast<size_t>(std::max(sysconf(_SC_PHYS_PAGES), 0L));
  const auto page = static_cast<size_t>(std::max(sysconf(_SC_PAGESIZE), 0L));
  return std::min(size_t{1} << 30, pages / 8 * page);
}

struct Block {
  void* data;
  size_t bytes;
};

class Pool {
 public:
  // The smallest kept block that holds `bytes` and is not so large that another would miss it; of
  // equal ones the newest, which may be in a cache still.
  Block take(size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      auto best = kept_.end();
      for (auto it = kept_.begin(); it != kept_.end(); ++it) {
        const bool fits = it->bytes >= bytes && it->bytes / 2 <= bytes;
        if (fits && (best == kept_.end() || it->bytes <= best->bytes)) best = it;
      }
      if (best != kept_.end()) {
        const Block block = *best;
        kept_bytes_ -= block.bytes;
        kept_.erase(best);
        return block;
      }
    }
    return {::operator new(bytes, kAlignment), bytes};
  }

  void give(Block block) {
    std::vector<Block> unwanted;
    {
      const std::lock_guard lock(mutex_);
      kept_.push_back(block);
      kept_bytes_ += block.bytes;
      unwanted = shrink();
    }
    release(unwanted);
  }

  size_t limit() {
    const std::lock_guard lock(mutex_);
    return limit_;
  }

  size_t set_limit(size_t bytes) {
    std::vector<Block> unwanted;
    size_t before;
    {
      const std::lock_guard lock(mutex_);
      before = std::exchange(limit_, bytes);
      unwanted = shrink();
    }
    release(unwanted);
    return before;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  // Takes out the oldest blocks above the limit.
  std::vector<Block> shrink() {
    std::vector<Block> out;
    auto it = kept_.begin();
    for (; it != kept_.end() && kept_bytes_ > limit_; ++it) {
      kept_bytes_ -= it->bytes;
      out.push_back(*it);
    }
    kept_.erase(kept_.begin(), it);
    return out;
  }

  static void release(const std::vector<Block>& blocks) {
    for (const Block& block : blocks) ::operator delete(block.data, kAlignment);
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // the oldest first
  size_t kept_bytes_ = 0;
  size_t limit_ = initial_limit();
};

Pool& pool() {
  // Never destroyed: a thread may give memory back while the process ends. Held by a thread at the
  // moment of a fork, the lock would stay closed in the child.
  static Pool* instance = [] {
    auto* p = new Pool;
    pthread_atfork([] { pool().mutex().lock(); }, [] { pool().mutex().unlock(); },
                   [] { pool().mutex().unlock(); });
    return p;
  }();
  return *instance;
}

// Whether tensors can own memory of the pool.
bool gives_memory_away() { return torch_from_blob != nullptr && pool().limit() > 0; }

}  // namespace

size_t kept_memory_limit() { return pool().limit(); }

size_t set_kept_memory_limit(size_t bytes) { return pool().set_limit(bytes); }

Scratch::Scratch(size_t bytes) {
  if (bytes == 0) return;
  const Block block = pool().take(bytes);
  data_ = block.data;
  bytes_ = block.bytes;
}

Scratch::~Scratch() {
  if (data_ != nullptr) pool().give({data_, bytes_});
}

Scratch& Scratch::operator=(Scratch&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Tensor empty_channels_last(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  const int64_t numel =
      std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
  const int64_t bytes = numel * (type == ScalarType::Double  ? 8
                                 : type == ScalarType::Float ? 4
                                                             : 2);
  if (bytes < kLargeBytes || !gives_memory_away()) {
    return torch::stable::empty(sizes, type, std::nullopt, std::nullopt, std::nullopt,
                                MemoryFormat::ChannelsLast);
  }
  const Block block = pool().take(static_cast<size_t>(bytes));
  const std::array<int64_t, 4> strides = {sizes[1] * sizes[2] * sizes[3], 1, sizes[3] * sizes[1],
                                          sizes[1]};
  const auto give_back = [](void* data, void* size) {
    pool().give({data, reinterpret_cast<size_t>(size)});
  };
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_from_blob(block.data, 4, sizes.data(), strides.data(), 0,
                      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(),
                      nullptr, 0, give_back, reinterpret_cast<void*>(block.bytes)));
  return Tensor(handle);
}

bool streams(const Tensor& output) {
  // A smaller one may still be in a second level cache when it is read.
  constexpr int64_t fewest_bytes = 2 << 20, channels = kLine / sizeof(float);
  return output.scalar_type() == ScalarType::Float && output.size(1) % channels == 0 &&
         output.numel() * static_cast<int64_t>(sizeof(float)) >= fewest_bytes &&
         gives_memory_away();
}

}  // namespace fastres::cpu

#include "memory.h"

#include <pthread.h>
#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <numeric>
#include <thread>
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

size_t system_page() {
  static const auto size = static_cast<size_t>(std::max(sysconf(_SC_PAGESIZE), 1L));
  return size;
}

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
  return std::min(size_t{1} << 30, pages / 8 * system_page());
}

struct Block {
  void* data;
  size_t bytes;
  std::thread::id user = {};  // who gave it back
};

// Memory that the system is asked to back with huge pages, where it has them: a network's weights
// and images lie in tens of thousands of small ones, and where a page has not been used for a while
// its first use can take microseconds (on virtual machines, above all).
class HugePages {
 public:
  // `bytes` are whole system pages; the result is aligned to a huge one. Throws std::bad_alloc.
  static char* map(size_t bytes) {
    void* mapped =
        mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    char* const begin = static_cast<char*>(mapped);
    char* const data = begin + (kPage - reinterpret_cast<size_t>(begin) % kPage) % kPage;
    if (data != begin) munmap(begin, static_cast<size_t>(data - begin));
    munmap(data + bytes, static_cast<size_t>(begin + kPage - data));
#if defined(MADV_HUGEPAGE)
    madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return data;
  }

  static void unmap(char* data, size_t bytes) { munmap(data, bytes); }

  // What to map for so many bytes: whole system pages, and whole huge ones where half of the last
  // one is used.
  static size_t whole(size_t bytes) {
    const size_t page = bytes % kPage < kPage / 2 ? system_page() : kPage;
    return (bytes + page - 1) / page * page;
  }

 private:
  static constexpr size_t kPage = size_t{2} << 20;
};

// Blocks out of mappings: large ones have their own, the others share them, and a mapping goes with
// its last block.
class Mappings {
 public:
  Block take(size_t bytes) {
    bytes = (bytes + kLine - 1) / kLine * kLine;
    if (bytes > kShared / 2) return {add(HugePages::whole(bytes)), bytes};
    if (current_ == nullptr || used_ + bytes > kShared) {
      current_ = add(kShared);
      used_ = 0;
    } else {
      ++find(current_)->second.blocks;
    }
    char* const data = current_ + used_;
    used_ += bytes;
    return {data, bytes};
  }

  // Whether the block was taken here.
  bool release(const Block& block) {
    const auto it = find(static_cast<char*>(block.data));
    if (it == all_.end()) return false;
    if (--it->second.blocks > 0) return true;
    if (it->first == current_) current_ = nullptr;
    HugePages::unmap(it->first, it->second.bytes);
    all_.erase(it);
    return true;
  }

 private:
  static constexpr size_t kShared = size_t{8} << 20;

  struct Mapping {
    size_t bytes;
    int64_t blocks;
  };

  char* add(size_t bytes) {
    char* const data = HugePages::map(bytes);
    all_[data] = {bytes, 1};
    return data;
  }

  // The mapping around `data`, or the end.
  std::map<char*, Mapping>::iterator find(char* data) {
    const auto next = all_.upper_bound(data);
    if (next == all_.begin()) return all_.end();
    const auto it = std::prev(next);
    return data < it->first + it->second.bytes ? it : all_.end();
  }

  std::map<char*, Mapping> all_;  // by where they begin
  char* current_ = nullptr;       // the one that is shared now, and how much of it is
  size_t used_ = 0;
};

class Pool {
 public:
  // A kept block that holds `bytes` and is not so large that another would miss it: the newest that
  // this thread gave back, which may be in its core's cache still, else the smallest.
  Block take(size_t bytes) {
    const auto user = std::this_thread::get_id();
    const auto fits = [bytes](const Block& b) { return b.bytes >= bytes && b.bytes / 2 <= bytes; };
    const auto is_own = [&](const Block& b) { return b.user == user && fits(b); };
    const std::lock_guard lock(mutex_);
    // From the end: a long list is not looked through for what was in use just before.
    const auto own = std::find_if(kept_.rbegin(), kept_.rend(), is_own);
    auto best = own == kept_.rend() ? kept_.end() : std::prev(own.base());
    if (best == kept_.end()) {
      for (auto it = kept_.begin(); it != kept_.end(); ++it) {
        if (fits(*it) && (best == kept_.end() || it->bytes <= best->bytes)) best = it;
      }
    }
    if (best == kept_.end()) {
      // Where nothing is kept, malloc's own memory is cheaper than a mapping.
      return limit_ > 0 ? mappings_.take(bytes) : Block{::operator new(bytes, kAlignment), bytes};
    }
    const Block block = *best;
    kept_bytes_ -= block.bytes;
    kept_.erase(best);
    return block;
  }

  void give(Block block) {
    block.user = std::this_thread::get_id();
    const std::lock_guard lock(mutex_);
    kept_.push_back(block);
    kept_bytes_ += block.bytes;
    shrink();
  }

  size_t limit() {
    const std::lock_guard lock(mutex_);
    return limit_;
  }

  size_t set_limit(size_t bytes) {
    const std::lock_guard lock(mutex_);
    const size_t before = std::exchange(limit_, bytes);
    shrink();
    return before;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  // Frees the oldest blocks above the limit.
  void shrink() {
    auto it = kept_.begin();
    for (; it != kept_.end() && kept_bytes_ > limit_; ++it) {
      kept_bytes_ -= it->bytes;
      if (!mappings_.release(*it)) ::operator delete(it->data, kAlignment);
    }
    kept_.erase(kept_.begin(), it);
  }

  std::mutex mutex_;
  Mappings mappings_;
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

namespace {

// A tensor in kept memory.
Tensor kept_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes, const int64_t* strides,
                   ScalarType type, int64_t bytes) {
  const Block block = pool().take(static_cast<size_t>(bytes));
  const auto give_back = [](void* data, void* size) {
    pool().give({data, reinterpret_cast<size_t>(size)});
  };
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_from_blob(block.data, static_cast<int64_t>(sizes.size()), sizes.data(), strides, 0,
                      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(),
                      nullptr, 0, give_back, reinterpret_cast<void*>(block.bytes)));
  return Tensor(handle);
}

}  // namespace

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
  const std::array<int64_t, 4> strides = {sizes[1] * sizes[2] * sizes[3], 1, sizes[3] * sizes[1],
                                          sizes[1]};
  return kept_tensor(sizes, strides.data(), type, bytes);
}

Tensor empty_floats(int64_t count) {
  const auto bytes = count * static_cast<int64_t>(sizeof(float));
  if (bytes < kLargeBytes || !gives_memory_away()) return empty_vector(count, ScalarType::Float);
  const std::array<int64_t, 1> sizes = {count}, strides = {1};
  return kept_tensor(sizes, strides.data(), ScalarType::Float, bytes);
}

bool streams(const Tensor& output) {
  return streams({output.size(0), output.size(1), output.size(2), output.size(3)},
                 output.scalar_type());
}

bool streams(const std::array<int64_t, 4>& output, ScalarType type) {
  // A smaller one may still be in a second level cache when it is read.
  constexpr int64_t fewest_bytes = 2 << 20, channels = kLine / sizeof(float);
  const auto [n, c, h, w] = output;
  return type == ScalarType::Float && c % channels == 0 &&
         n * c * h * w * static_cast<int64_t>(sizeof(float)) >= fewest_bytes && gives_memory_away();
}

}  // namespace fastres::cpu

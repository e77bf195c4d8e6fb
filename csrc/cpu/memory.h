// Memory that outlives the call: fresh pages cost more than many a convolution's arithmetic.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>

#include "visibility.h"

namespace fastres::cpu {

// Blocks that are given back are kept for the next taker, the oldest freed where they would be more
// than this many bytes: 1 GiB or an eighth of the machine's memory, whichever is less, or what the
// environment variable FASTRES_CPU_KEEP_MB says. 0 keeps nothing.
FASTRES_EXPORTED size_t kept_memory_limit();

// Sets it, frees what is above, and returns the limit before.
FASTRES_EXPORTED size_t set_kept_memory_limit(size_t bytes);

// Working memory, uninitialised and aligned to 64 bytes, given back when it goes out of scope.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(Scratch&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = nullptr;
  }
  Scratch& operator=(Scratch&& other) noexcept;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* floats() const { return static_cast<float*>(data_); }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

inline Scratch scratch_floats(int64_t count) {
  return Scratch(static_cast<size_t>(count) * sizeof(float));
}

// Uninitialised images. Large ones live in kept memory, where torch (2.11 and later) can be given
// memory with a deleter.
torch::stable::Tensor empty_channels_last(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                          torch::headeronly::ScalarType type);

// An uninitialised vector of float32, in kept memory where it is large.
torch::stable::Tensor empty_floats(int64_t count);

// Whether kernels should write this result past the caches: a large one of float32, whose channels
// fill cache lines, in kept memory. (Fresh pages take such writes 1.6 times more slowly.)
bool streams(const torch::stable::Tensor& output);
bool streams(const std::array<int64_t, 4>& output, torch::headeronly::ScalarType type);

}  // namespace fastres::cpu

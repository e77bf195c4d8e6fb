// What the checked operator of avg_pool_linear.cpp gives to its loops. No torch in here.
#pragma once

#include <cstdint>

namespace fastres::cpu {

struct AvgPoolLinearArgs {
  const void* input;   // (images, pixels, channels)
  void* means;         // (images, pitch) of the computing type; 0 beyond the channels
  const void* weight;  // (outputs, channels)
  const void* bias;    // (outputs,), or null
  void* output;        // (images, outputs)
  int64_t images, pixels, channels, outputs;
  int64_t pitch;  // channels rounded up to whole vectors
};

// The channels of an image's pieces for AvgPoolFn.
inline constexpr int64_t kAvgPoolChannels = 512;
// The images and the rows of the weight that a LinearFn's tile has at most.
inline constexpr int64_t kLinearImages = 4;
inline constexpr int64_t kLinearRows = 4;

// Means of pieces [begin, end): an image's pieces come one after the other.
using AvgPoolFn = void (*)(const AvgPoolLinearArgs&, int64_t begin, int64_t end);

// Results of tiles [begin, end): the tiles of the same rows come one after the other.
using LinearFn = void (*)(const AvgPoolLinearArgs&, int64_t begin, int64_t end);

}  // namespace fastres::cpu

// Which of six algorithms computes a convolution. All but the last take one pass over packed
// weights in float32, with prologue, epilogue and statistics; digits, for inference, with the
// epilogue alone:
//   winograd4, winograd2  minimal filtering of tiles of 4x4 and 2x2 pixels: 3x3 without a stride or
//                         with stride 2 (winograd.h); winograd4 also a stem, along its
//                         lines (winograd_stem.h)
//   digits                an implicit GEMM on the processor's matrix unit, of bytes, for weights
//                         that are kept (conv_digits.h)
//   amx                   the same, of bfloat16 (conv_amx.h)
//   packed                an implicit GEMM (conv_kernel.inl)
//   aten                  torch's own convolution between passes of ours: for what the others do
//                         not do (groups, dilation, float64), and where torch's is the faster one
// The environment variable FASTRES_CPU_ALGORITHM names one for every convolution that it can do.
#pragma once

#include <optional>

#include "conv_shape.h"
#include "kernel_table.h"

namespace fastres::cpu {

enum class Algorithm { winograd4, winograd2, digits, amx, packed, aten };

constexpr bool is_winograd(Algorithm a) {
  return a == Algorithm::winograd4 || a == Algorithm::winograd2;
}

// Pixels across an output tile.
constexpr int winograd_tile(Algorithm a) { return a == Algorithm::winograd4 ? 4 : 2; }

// Whether one of Winograd's algorithms is allowed and takes this shape.
bool winograd_takes(const ConvShape& s, Algorithm a);

// As FASTRES_CPU_ALGORITHM has it.
const char* algorithm_name(Algorithm a);

// What FASTRES_CPU_ALGORITHM names, if anything. Read at every call, a getenv among milliseconds,
// so that a test can change it.
std::optional<Algorithm> algorithm_from_environment();

// Whether this processor has instructions for the dtype that torch uses and ours do not.
bool torch_is_faster(DType dtype);

// Why the matrix unit computes a convolution of bfloat16.
inline constexpr const char* kTakenAsTheyAre = "the matrix unit takes such numbers as they are";

// What reading a packed weight costs, in multiply-adds, when it comes from memory, as in a model
// that has more weights than the caches hold.
double cold_read_cost();

// The algorithm that takes the least time, but for aten; `packing` where the weights are packed for
// one call only. A shape without pictures (n = 0) is of any.
Algorithm cheapest_algorithm(const ConvShape& s, bool packing);

}  // namespace fastres::cpu

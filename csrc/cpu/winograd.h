// Winograd's convolution: which shapes it takes, what it would cost, and its threads.
#pragma once

#include <optional>
#include <vector>

#include "conv_shape.h"
#include "kernel_table.h"
#include "visibility.h"

namespace fastres::cpu {

// Whether it may be used at all, in the whole process; true at first.
FASTRES_EXPORTED bool winograd_allowed();
FASTRES_EXPORTED void set_winograd_allowed(bool allowed);

// Whether the kernels take this shape, and are allowed.
bool winograd_fits(const ConvShape& s);

// Length of the packed kernels for output tiles of `tile` (4 or 2) pixels squared. Their form
// depends on whether the matrix unit multiplies, and so on the number of tiles.
int64_t winograd_packed_floats(const ConvShape& s, int tile);

void winograd_pack(const ConvWeight& weight, const ConvShape& s, int tile, float* packed);

// Multiply-adds of a call, memory and transforms counted as as many as they take the time of;
// `packing` where the kernels must be packed first.
double winograd_cost(const ConvShape& s, int tile, bool packing);

// Runs it with packed kernels in args.weight and returns (kConvSums, channels) of the results where
// asked for, else nothing in it; no value where a result is not finite, and may be wrong.
std::optional<std::vector<double>> run_winograd(ConvArgs args, const ConvShape& s, DType dtype,
                                                int tile, bool statistics);

// Whether gradients can be computed so: there is no algorithm for those of a stride.
bool winograd_gradient_fits(const ConvShape& s);

// Whether the gradient of the kernels is worth its transforms.
bool winograd_gradient_pays(const ConvShape& s);

// The kernels' gradient into `out`, float32, from args.input (with its prologue) and `gradient`,
// dense (n, oh, ow, co). False where a result is not finite, and may be wrong.
bool run_winograd_gradient(ConvArgs args, const void* gradient, const ConvShape& s, DType dtype,
                           const WinogradKernelGradient& out);

}  // namespace fastres::cpu

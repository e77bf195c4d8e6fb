// Winograd's algorithm along the lines of a stem (winograd_stem_kernel.h): which shapes it takes,
// what it would cost, and its threads.
#pragma once

#include <optional>
#include <vector>

#include "conv_shape.h"
#include "kernel_table.h"
#include "max_pool2d_kernel.h"

namespace fastres::cpu {

// Whether the kernels take this shape.
bool is_winograd_stem(const ConvShape& s);

int64_t winograd_stem_packed_floats(const ConvShape& s);

void winograd_stem_pack(const ConvWeight& weight, float* packed);

// As winograd_cost and run_winograd.
double winograd_stem_cost(const ConvShape& s, bool packing);
std::optional<std::vector<double>> run_winograd_stem(ConvArgs args, const ConvShape& s, DType dtype,
                                                     bool statistics);

// Whether a max-pool can be computed along with the convolution before it.
bool winograd_stem_pools(const ConvShape& s, const PoolGeometry& pool, DType dtype);

// The convolution, without a residual, and the max-pool of it, whose (n, oh, ow, c) result is what
// args.output and args.stream mean. False where a result is not finite, and may be wrong.
bool run_winograd_stem_pool(ConvArgs args, const ConvShape& s, const PoolGeometry& pool,
                            DType dtype);

}  // namespace fastres::cpu

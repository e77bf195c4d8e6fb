// Winograd's algorithm along the lines of a stem (winograd_stem_kernel.h): which shapes it takes,
// what it would cost, and its threads.
#pragma once

#include <optional>
#include <vector>

#include "conv_shape.h"
#include "kernel_table.h"

namespace fastres::cpu {

// Whether the kernels take this shape.
bool is_winograd_stem(const ConvShape& s);

int64_t winograd_stem_packed_floats(const ConvShape& s);

void winograd_stem_pack(const ConvWeight& weight, float* packed);

// As winograd_cost and run_winograd.
double winograd_stem_cost(const ConvShape& s, bool packing);
std::optional<std::vector<double>> run_winograd_stem(ConvArgs args, const ConvShape& s, DType dtype,
                                                     bool statistics);

}  // namespace fastres::cpu

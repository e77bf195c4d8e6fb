// Strassen's multiplication for 1x1 convolutions (strassen_kernel.h): which shapes it takes, what
// it would cost, and its threads.
#pragma once

#include <optional>
#include <vector>

#include "conv_shape.h"
#include "kernel_table.h"

namespace fastres::cpu {

// Whether the kernels take this shape.
bool is_strassen(const ConvShape& s);

int64_t strassen_packed_floats(const ConvShape& s);

void strassen_pack(const ConvWeight& weight, float* packed);

// As winograd_cost and run_winograd.
double strassen_cost(const ConvShape& s, bool packing);
std::optional<std::vector<double>> run_strassen(ConvArgs args, const ConvShape& s, DType dtype,
                                                bool statistics);

}  // namespace fastres::cpu

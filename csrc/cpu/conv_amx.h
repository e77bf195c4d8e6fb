// Convolutions on the processor's matrix unit: which shapes are worth it, and their threads.
#pragma once

#include <optional>
#include <vector>

#include "conv_shape.h"
#include "kernel_table.h"

namespace fastres::cpu {

// Whether the kernels in use have one.
bool has_matrix_unit();

// Whether it beats the other algorithms at this shape.
bool amx_pays(const ConvShape& s);

// As run_winograd, with weights packed as the implicit GEMM without a matrix unit has them: they
// are split on the way, which takes less time than reading half as many bytes again.
std::optional<std::vector<double>> run_amx(ConvArgs args, ConvShape s, DType dtype,
                                           bool statistics);

}  // namespace fastres::cpu

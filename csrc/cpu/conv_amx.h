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

// Length of the packed weights. It is no other form's: a line is left over.
int64_t amx_packed_floats(const ConvShape& s, DType dtype);

// As run_winograd, with weights that KernelTable::amx_pack packed. They are split on the way, which
// takes less time than reading half as many bytes again.
std::optional<std::vector<double>> run_amx(const ConvArgs& args, const ConvShape& s, DType dtype,
                                           bool statistics);

// The same of args that say more.
std::optional<std::vector<double>> run_amx(AmxConvArgs args, ConvShape s, DType dtype,
                                           bool statistics);

// A convolution into a dense output.
AmxConvArgs dense_args(const ConvArgs& conv, const ConvShape& s);

// As winograd_stem_pools and run_winograd_stem_pool.
bool amx_pools(const ConvShape& s, const PoolGeometry& pool, DType dtype);
bool run_amx_pool(const ConvArgs& args, const ConvShape& s, const PoolGeometry& pool, DType dtype);

// Whether it beats the other algorithms at the gradient of this convolution's input.
bool amx_input_gradient_pays(const ConvShape& s);

// The gradient of the input of convolution `s` into args' output, strided as args say: args' input
// is the gradient of its output. Where no tap reaches it, the output stays as it is. Returns
// (kConvSums, whole panels) of sums, with x the two that AmxConvArgs names and one of zeros; no
// value where a result is not finite.
std::optional<std::vector<double>> run_amx_input_gradient(AmxConvArgs args,
                                                          const ConvWeight& weight,
                                                          const ConvShape& s, DType dtype);

}  // namespace fastres::cpu

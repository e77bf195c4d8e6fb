// What the max-pool in a chain shares with the op.
#pragma once

#include <array>
#include <vector>

#include "kernel_table.h"
#include "max_pool2d_kernel.h"

namespace fastres::cpu {

// Of images of such (n, c, h, w) sizes; fails where there is no pool of them.
PoolGeometry check_pool(const char* op, const std::array<int64_t, 4>& input,
                        const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding);

// The pool of dense channels_last images of one pixel or more into dense ones.
void max_pool2d_of(const PoolGeometry& g, DType dtype, const void* input, void* output,
                   bool stream);

}  // namespace fastres::cpu

// What the max-pool in a chain shares with the op.
#pragma once

#include <array>
#include <vector>

#include "max_pool2d_kernel.h"

namespace fastres::cpu {

// Of images of such (n, c, h, w) sizes; fails where there is no pool of them.
PoolGeometry check_pool(const char* op, const std::array<int64_t, 4>& input,
                        const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding);

}  // namespace fastres::cpu

// The log of convolutions, which the environment variable FASTRES_LOG=conv turns on.
#pragma once

#include "conv_shape.h"
#include "kernel_table.h"

namespace fastres::cpu {

// Writes to stderr what computes a convolution and why, the first time that this is so in the
// process; nothing where FASTRES_LOG is not set. It is read once. Throws std::runtime_error where
// it is anything but conv.
void log_convolution(const char* op, const ConvShape& s, DType dtype, const char* algorithm,
                     const char* reason);

}  // namespace fastres::cpu

// The weight gradient by AMX: which shapes it takes, and its threads.
#pragma once

#include "amx_gradient_kernel.h"
#include "conv_shape.h"
#include "kernel_table.h"

namespace fastres::cpu {

// Whether this processor has the kernel and it takes this shape.
bool amx_gradient_fits(const ConvShape& s, DType dtype);

// Whether it beats the other algorithms at this shape.
bool amx_gradient_pays(const ConvShape& s);

// The weight's gradient into `out`; args.conv holds the input and its prologue, sizes are `s`'s.
// False where a result is not finite, and may be wrong.
bool run_amx_gradient(AmxGradientArgs args, const ConvShape& s, DType dtype,
                      const WinogradKernelGradient& out);

}  // namespace fastres::cpu

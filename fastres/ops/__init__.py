"""The fused ops: what each means, its checks, its shape function and its gradient.

Each op has one schema (csrc/register.cpp). torch's dispatcher picks who computes it: the C++
kernel on a CPU, the Triton kernel on CUDA, the plain-torch reference everywhere else.
"""

import torch  # noqa: F401  (loads the libraries that the extension needs)

from fastres import _C  # noqa: F401  (defines the schemas and the CPU kernels)
from fastres.ops.add_relu import add_relu
from fastres.ops.avg_pool_linear import avg_pool_linear
from fastres.ops.bn_add_relu import bn_add_relu
from fastres.ops.conv_bn_relu import (
    conv_bn_relu,
    pack_conv_weight,
    packed_conv_weight_numel,
)
from fastres.ops.conv_chain import conv_chain
from fastres.ops.conv_stats import conv_stats
from fastres.ops.decompositions import decompositions
from fastres.ops.max_pool2d import max_pool2d
from fastres.ops.recomputed import bn_add_relu_recomputed, in_a_row

__all__ = [
    "add_relu",
    "avg_pool_linear",
    "bn_add_relu",
    "bn_add_relu_recomputed",
    "conv_bn_relu",
    "conv_chain",
    "conv_stats",
    "decompositions",
    "in_a_row",
    "max_pool2d",
    "pack_conv_weight",
    "packed_conv_weight_numel",
]

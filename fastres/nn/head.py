"""A classifier's head: the mean over the pixels and the linear layer after it, in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .conv_bn import Module, is_untouched, is_watched
from .precision import autocast_dtype

# Beyond, torch's matrix product is as fast.
_MOST_IMAGES = 64


def head(avgpool: Module, fc: Module, x: Tensor) -> Any:
    """``fc(flatten(avgpool(x), 1))``, by the fused op on the CPU; they may be any modules."""
    if is_head(avgpool, fc, x) and not is_watched():
        weight, bias = fc._parameters["weight"], fc._parameters["bias"]
        return ops.avg_pool_linear(x, weight, bias)
    return fc(torch.flatten(avgpool(x), 1))


def is_head(avgpool: Module, fc: Module, x: Any) -> bool:
    """Whether the op says the same as calling the modules, and is as fast as they are.

    Compilers, tracers and kinds of tensors get the modules, whose operators they know.
    """
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[0] <= _MOST_IMAGES
        and autocast_dtype(x) is None
        and is_untouched(avgpool, nn.AdaptiveAvgPool2d)
        and avgpool.output_size in (1, (1, 1))
        and is_untouched(fc, nn.Linear)
        and all(
            parameter is None
            or (type(parameter) is nn.Parameter and parameter.dtype == torch.float32)
            for parameter in (fc._parameters.get("weight"), fc._parameters.get("bias"))
        )
        and fc._parameters.get("weight") is not None
    )

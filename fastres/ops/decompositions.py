"""The ops in torch's own operators, for a program that holds them already.

A program of `torch.export` names the ops. Whoever knows torch's operators alone (the ONNX exporter,
other runtimes) gets them after `program.run_decompositions(decompositions())`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from fastres.ops import reference


def decompositions() -> dict[OpOverload, Callable[..., Tensor | tuple[Tensor, ...]]]:
    """What each op is in torch's own operators, for ``ExportedProgram.run_decompositions``.

    >>> program = program.run_decompositions(fastres.ops.decompositions())
    """
    ops = torch.ops.fastres
    return {
        ops.add_relu.default: reference.add_relu,
        ops.avg_pool_linear.default: reference.avg_pool_linear,
        ops.bn_add_relu.default: reference.bn_add_relu,
        ops.conv_bn_relu.default: _conv_bn_relu,
        ops.conv_stats.default: reference.conv_stats,
        ops.max_pool2d.default: reference.max_pool2d,
    }


def _conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
    packed: Tensor | None,
) -> Tensor:
    """By the operators of the modules, which exporters know how to fuse."""
    z = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    exact = z.to(running_mean.dtype)
    y = F.batch_norm(exact, running_mean, running_var, bn_weight, bn_bias, False, 0.0, eps)
    if residual is not None:
        y = y + residual.to(y.dtype)
    if relu:
        y = F.relu(y)
    return reference.channels_last(y.to(z.dtype))

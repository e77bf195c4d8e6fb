"""Batch statistics of several processes' images together, for ``nn.SyncBatchNorm``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def synchronises(bn: nn.SyncBatchNorm) -> bool:
    """Whether there are other processes with which ``bn`` shares its statistics."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size(bn.process_group) > 1


def synchronised(
    mean: Tensor, var: Tensor, count: int, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean and the biased variance over all processes' values, and how many these are.

    Args:
        mean, var: (C,), of this process's ``count`` values a channel.
        count: at least 1.
        group: the processes; None is all.

    Returns:
        mean, var: (C,), differentiable; their gradients are those of all processes' results.
        total: (), the number of values, not differentiable.
    """
    # In float64, where the mean's square may be taken off the second moment again.
    m, v = mean.double(), var.double()
    sums = torch.cat([count * m, count * (v + m * m), m.new_tensor([count])])
    sums = _Sum.apply(sums, group)
    total = sums[-1].detach()
    m, second = (sums[:-1] / total).chunk(2)
    v = (second - m * m).clamp(min=0)
    return m.to(mean.dtype), v.to(var.dtype), total.to(mean.dtype)


class _Sum(torch.autograd.Function):
    """The sum over the processes; so is its gradient, for every process's result holds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None

"""bn_add_relu whose result the backward computes again instead of keeping it.

A residual block's output is cheap to compute, one pass over its last convolution's output and the
shortcut, both of which the backward needs anyway. So the autograd node of `bn_add_relu_recomputed`
keeps those, and a `conv_stats` that reads the result keeps that node. The first of the two that
wants the result in the backward computes it, with the forward's bits; the node's own gradient is
the last to want it and lets it go (Chen et al. 2016, https://arxiv.org/abs/1604.06174).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres.ops._shapes import to_parameter_dtype
from fastres.ops.bn_add_relu import input_gradients


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *call: Any) -> Tensor:
        z, mean, var, weight, bias, eps, residual, r_mean, r_var, r_weight, r_bias, r_eps, relu = (
            call
        )
        y: Tensor = torch.ops.fastres.bn_add_relu(*call)
        # A shortcut that is itself computed again is not kept either.
        ctx.shortcut = None if residual is None else source_of(residual)
        kept = residual if ctx.shortcut is None else None
        ctx.save_for_backward(z, mean, var, weight, bias, kept, r_mean, r_var, r_weight, r_bias)
        ctx.eps, ctx.residual_eps, ctx.relu = eps, r_eps, relu
        ctx.in_a_row = 1 + in_a_row(residual)
        ctx.version = y._version
        ctx.recomputed = None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        y, residual, saved = _recompute(ctx)
        ctx.recomputed = None
        z, mean, var, weight, bias, _, r_mean, r_var, r_weight, r_bias = saved
        return input_gradients(
            dy, y, z, mean, var, weight, ctx.eps, residual, r_mean, r_var, r_weight,
            ctx.residual_eps, ctx.relu, has_bias=bias is not None,
            has_residual_bias=r_bias is not None,
        )  # fmt: skip


def _recompute(node: Any) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """The result of `node`, its shortcut and what it saved; held until its own gradient is taken.

    What is saved is unpacked once, which is all that `torch.utils.checkpoint` allows.
    """
    # With a graph for a second derivative, or without.
    graph = torch.is_grad_enabled()
    if node.recomputed is None or (graph and not node.recomputed[0].requires_grad):
        saved = node.saved_tensors
        z, mean, var, weight, bias, residual, r_mean, r_var, r_weight, r_bias = saved
        if node.shortcut is not None:
            residual = output_of(node.shortcut)
        y = torch.ops.fastres.bn_add_relu(
            z, mean, var, weight, bias, node.eps,
            residual, r_mean, r_var, r_weight, r_bias, node.residual_eps, node.relu,
        )  # fmt: skip
        node.recomputed = y, residual, saved
    result: tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]] = node.recomputed
    return result


def output_of(source: Any) -> Tensor:
    """What `source_of` stood for, (N, C, H, W), with the bits that the forward computed.

    Raises:
        RuntimeError: as for any saved tensor, where one that it takes was changed in place or
            freed by an earlier backward.
    """
    return _recompute(source)[0]


def source_of(x: Tensor) -> Any | None:
    """The autograd node that can compute x again, or None: x was changed, or is anything else."""
    node = x.grad_fn
    if node is None or getattr(type(node), "_forward_cls", None) is not _Recomputed:
        return None
    return node if node.version == x._version else None  # type: ignore[attr-defined]


def in_a_row(x: Tensor | None) -> int:
    """How many results have to be computed again to have x: 0 where x is kept."""
    source = None if x is None else source_of(x)
    return 0 if source is None else source.in_a_row


def bn_add_relu_recomputed(
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_eps: float,
    relu: bool,
) -> Tensor:
    """`bn_add_relu`, whose result neither it nor a `conv_stats` keeps for the backward.

    Worth it where `residual` is kept for the backward anyway, or is such a result itself.
    """
    result: Tensor = _Recomputed.apply(
        z,
        mean,
        var,
        to_parameter_dtype(weight, z),
        to_parameter_dtype(bias, z),
        eps,
        residual,
        residual_mean,
        residual_var,
        to_parameter_dtype(residual_weight, z),
        to_parameter_dtype(residual_bias, z),
        residual_eps,
        relu,
    )
    return result

"""conv_stats: convolution with the previous BatchNorm and ReLU before it and statistics after it.

The forward half of a training step's conv-bn-relu. relu(bn(input)) is computed as the input is
loaded and never kept; mean and variance are taken of the output as it is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres.ops._register import register_op
from fastres.ops._shapes import (
    check_activation,
    check_like,
    check_prologue,
    check_vectors,
    conv_output_shape,
    new_activation,
    new_vector,
    to_parameter_dtype,
)
from fastres.ops.recomputed import output_of, source_of
from fastres.ops.reference import memory_format_of


def conv_stats(
    input: Tensor,
    weight: Tensor,
    in_mean: Tensor | None,
    in_var: Tensor | None,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    in_eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return z = conv(a, weight) and each channel's mean and biased variance of z.

    a = input without `in_mean`, else relu((input - in_mean) / sqrt(in_var + in_eps) * in_weight
    + in_bias). The padding comes after it: padded zeros stay zeros.

    Args:
        input: (N, C_in, H, W), float32, bfloat16, float16 or float64; any strides, channels_last
            is fastest.
        weight: (C_out, C_in/groups, kh, kw), of `input`'s dtype.
        in_mean, in_var: (C_in,), the statistics of `input`, or both None.
        in_weight, in_bias: (C_in,) or None, which means 1 and 0.
        in_eps: added to `in_var`.
        stride, padding, dilation: two integers each.
        groups: as in torch.nn.functional.conv2d.

    Returns:
        z, (N, C_out, H_out, W_out), channels_last, of `input`'s dtype; mean and var, (C_out,),
        float32 (float64 for float64), over N, H_out and W_out; var is the biased variance. All
        three are differentiable.

    Raises:
        RuntimeError: where an argument's shape, dtype or device does not fit; it names it.
    """
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.fastres.conv_stats(
        input,
        weight,
        in_mean,
        in_var,
        to_parameter_dtype(in_weight, input),
        to_parameter_dtype(in_bias, input),
        in_eps,
        stride,
        padding,
        dilation,
        groups,
    )
    return result


def _fake(
    input: Tensor,
    weight: Tensor,
    in_mean: Tensor | None,
    in_var: Tensor | None,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    in_eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "conv_stats"
    shape = conv_output_shape(op, input, weight, stride, padding, dilation, groups)
    prologue = {"in_mean": in_mean, "in_var": in_var, "in_weight": in_weight, "in_bias": in_bias}
    check_prologue(op, input, prologue)
    channels = shape[1]
    return new_activation(input, shape), new_vector(input, channels), new_vector(input, channels)


def _fake_backward(
    dz: Tensor,
    dmean: Tensor,
    dvar: Tensor,
    input: Tensor,
    weight: Tensor,
    z: Tensor,
    mean: Tensor,
    in_mean: Tensor | None,
    in_var: Tensor | None,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    in_eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "conv_stats_backward"
    check_activation(op, "z", z)
    check_like(op, "dz", dz, "z", z)
    check_vectors(op, z, z.shape[1], dmean=dmean, dvar=dvar, mean=mean)
    conv_output_shape(op, input, weight, stride, padding, dilation, groups)
    prologue = {"in_mean": in_mean, "in_var": in_var, "in_weight": in_weight, "in_bias": in_bias}
    check_prologue(op, input, prologue)
    affine = needs_input and in_mean is not None

    def vector(present: bool) -> Tensor:
        return new_vector(input, input.shape[1] if present else 0)

    dweight = torch.empty_like(weight, memory_format=memory_format_of(weight))
    return (
        new_activation(input, input.shape) if needs_input else input.new_empty(0),
        dweight if needs_weight else weight.new_empty(0),
        vector(affine),
        vector(affine),
        vector(affine and in_weight is not None),
        vector(affine and in_bias is not None),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weight, in_mean, in_var, in_weight, in_bias, in_eps = inputs[:7]
    z, mean, _ = output
    ctx.source = source_of(input)
    kept = input if ctx.source is None else None
    ctx.save_for_backward(kept, weight, z, mean, in_mean, in_var, in_weight, in_bias)
    ctx.in_eps = in_eps
    ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs[7:]


def _backward(ctx: Any, dz: Tensor, dmean: Tensor, dvar: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, z, mean, in_mean, in_var, in_weight, in_bias = ctx.saved_tensors
    if ctx.source is not None:
        input = output_of(ctx.source)
    needs = ctx.needs_input_grad
    # The prologue's vectors get theirs from the same pass as the input.
    needs_input = needs[0] or any(needs[2:6])
    dinput, dweight, din_mean, din_var, din_weight, din_bias = (
        torch.ops.fastres.conv_stats_backward(
            dz, dmean, dvar, input, weight, z, mean, in_mean, in_var, in_weight, in_bias,
            ctx.in_eps, ctx.stride, ctx.padding, ctx.dilation, ctx.groups,
            needs_input, needs[1],
        )
    )  # fmt: skip
    return (
        dinput if needs[0] else None,
        dweight if needs[1] else None,
        din_mean if needs[2] else None,
        din_var if needs[3] else None,
        din_weight if needs[4] else None,
        din_bias if needs[5] else None,
        *(None,) * 5,
    )


register_op("conv_stats", _fake, _backward, _setup_context)
register_op("conv_stats_backward", _fake_backward)

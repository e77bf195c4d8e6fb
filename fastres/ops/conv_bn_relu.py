"""conv_bn_relu: convolution, BatchNorm of given statistics, residual and ReLU at once (inference).

The output is written once, finished. Nothing is folded into the weight, so nothing goes stale:
the BatchNorm's scale and shift are applied to the accumulators. `pack_conv_weight` puts a weight
into the order in which the CPU kernel reads it; a result that is kept must be made anew when the
weight changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres import _C
from fastres.ops._register import register_op
from fastres.ops._shapes import (
    check,
    check_activation,
    check_placed_like,
    check_vectors,
    conv_output_shape,
    new_activation,
    to_parameter_dtype,
)
from fastres.ops.reference import parameter_dtype


def pack_conv_weight(
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
    input_size: list[int] | None = None,
) -> Tensor:
    """Return `weight` in the form that one of `conv_bn_relu`'s CPU kernels reads.

    Every form serves inputs of every size; which one is fastest depends on the size.

    Args:
        weight: (C_out, C_in/groups, kh, kw).
        stride, padding, dilation: two integers each, of the convolution.
        groups: the convolution's.
        input_size: (N, H, W) of the input to be expected; None if it is not known.

    Returns:
        A float32 vector for the argument `packed` of `conv_bn_relu`; of length 0 where packing
        is of no use (other devices, groups, dilation; other dtypes than float32, but for bfloat16
        on a processor's matrix unit). It is a copy: make it anew when `weight` changes.
    """
    size: list[int] = []
    if input_size is not None:
        size = input_size
    result: Tensor = torch.ops.fastres.pack_conv_weight(
        weight, stride, padding, dilation, groups, size
    )
    return result


def packed_conv_weight_numel(
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    input_size: list[int],
) -> int:
    """Return the length of `pack_conv_weight`'s result, which tells its form, without packing."""
    if weight.device.type != "cpu":
        return 0
    shape = [int(i) for i in weight.shape]
    dtype = str(weight.dtype).removeprefix("torch.")
    return _C.packed_conv_weight_numel(shape, stride, padding, dilation, groups, input_size, dtype)


def conv_bn_relu(
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
    groups: int = 1,
    relu: bool = True,
    packed: Tensor | None = None,
) -> Tensor:
    """Return relu(bn(conv(input, weight) + bias) + residual), written to memory once.

    bn is BatchNorm in eval mode: (x - running_mean) / sqrt(running_var + eps) * bn_weight +
    bn_bias (Ioffe and Szegedy 2015, algorithm 2).

    Args:
        input: (N, C_in, H, W), float32, bfloat16, float16 or float64; any strides, channels_last
            is fastest.
        weight: (C_out, C_in/groups, kh, kw), of `input`'s dtype.
        bias: (C_out,) or None: the convolution's.
        running_mean, running_var: (C_out,).
        bn_weight, bn_bias: (C_out,) or None, which means 1 and 0.
        eps: added to the variance.
        residual: (N, C_out, H_out, W_out) of `input`'s dtype, or None.
        stride, padding, dilation: two integers each.
        groups: as in torch.nn.functional.conv2d.
        relu: whether to apply ReLU.
        packed: `pack_conv_weight`'s result for this weight, or None: then a kernel that wants
            it packs at every call.

    Returns:
        (N, C_out, H_out, W_out), channels_last, of `input`'s dtype.

    Raises:
        RuntimeError: where an argument's shape, dtype or device does not fit; it names it.
    """
    dtype = parameter_dtype(input)
    result: Tensor = torch.ops.fastres.conv_bn_relu(
        input,
        weight,
        to_parameter_dtype(bias, input),
        running_mean if running_mean.dtype == dtype else running_mean.to(dtype),
        running_var if running_var.dtype == dtype else running_var.to(dtype),
        to_parameter_dtype(bn_weight, input),
        to_parameter_dtype(bn_bias, input),
        eps,
        residual,
        stride,
        padding,
        dilation,
        groups,
        relu,
        packed,
    )
    return result


def _fake_pack(
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    input_size: list[int],
) -> Tensor:
    check_activation("pack_conv_weight", "weight", weight)
    numel = packed_conv_weight_numel(weight, stride, padding, dilation, groups, input_size)
    return weight.new_empty(numel, dtype=torch.float32)


def _fake(
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
    op = "conv_bn_relu"
    shape = conv_output_shape(op, input, weight, stride, padding, dilation, groups)
    check_vectors(
        op,
        input,
        shape[1],
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        bn_weight=bn_weight,
        bn_bias=bn_bias,
    )
    if residual is not None:
        check_activation(op, "residual", residual)
        check_placed_like(op, "residual", residual, "input", input)
        check(
            all(a == b for a, b in zip(residual.shape, shape, strict=True)),
            op,
            f"residual must be {shape}, got {tuple(residual.shape)}",
        )
    return new_activation(input, shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, mean, var, bn_weight, _, eps = inputs[:8]
    ctx.eps = eps
    ctx.stride, ctx.padding, ctx.dilation, ctx.groups, ctx.relu = inputs[9:14]
    # Without ReLU nobody reads the output here, and who is given it may change it in place.
    y = output if ctx.relu else None
    ctx.save_for_backward(input, weight, bias, mean, var, bn_weight, y)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Fine-tuning with frozen statistics: z is computed again where a gradient asks for it."""
    input, weight, bias, mean, var, bn_weight, y = ctx.saved_tensors
    (
        needs_input, needs_weight, needs_bias, needs_mean, needs_var, needs_bn_weight,
        needs_bn_bias, _, needs_residual, *_,
    ) = ctx.needs_input_grad  # fmt: skip
    masked = torch.ops.fastres.add_relu_backward(dy, y) if ctx.relu else dy
    g = masked.to(parameter_dtype(dy))
    istd = torch.rsqrt(var + ctx.eps)
    scale = istd if bn_weight is None else istd * bn_weight
    dinput = dweight = dvar = dbn_weight = None
    if needs_input or needs_weight:
        dinput, dweight, _ = torch.ops.aten.convolution_backward(
            (g * scale[:, None, None]).to(dy.dtype), input, weight, None,
            ctx.stride, ctx.padding, ctx.dilation, False, [0, 0], ctx.groups,
            [needs_input, needs_weight, False],
        )  # fmt: skip
    sum_g = g.sum((0, 2, 3))
    if needs_var or needs_bn_weight:
        z = torch.ops.aten.convolution(
            input, weight, None, ctx.stride, ctx.padding, ctx.dilation, False, [0, 0], ctx.groups
        )
        center = mean if bias is None else mean - bias
        sum_gz = (g * (z.to(g.dtype) - center[:, None, None])).sum((0, 2, 3))
        dbn_weight = sum_gz * istd
        dvar = -0.5 * scale * istd * istd * sum_gz
    return (
        dinput,
        dweight,
        scale * sum_g if needs_bias else None,
        -scale * sum_g if needs_mean else None,
        dvar if needs_var else None,
        dbn_weight if needs_bn_weight else None,
        sum_g if needs_bn_bias else None,
        None,
        masked if needs_residual else None,
        *(None,) * 6,
    )


def _pack_backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
    """`packed` is another form of `weight`, whose gradient conv_bn_relu gives to `weight`."""
    return (None,) * 6


register_op("pack_conv_weight", _fake_pack, _pack_backward)
register_op("conv_bn_relu", _fake, _backward, _setup_context)

"""max_pool2d: max-pool, with the previous BatchNorm and ReLU before it.

relu(bn(input)) is computed as the input is loaded and never kept. The backward finds the maxima
again, so that no index is kept either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres.ops._register import register_op
from fastres.ops._shapes import (
    check,
    check_activation,
    check_placed_like,
    check_prologue,
    new_activation,
    new_vector,
    to_parameter_dtype,
)


def max_pool2d(
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    in_mean: Tensor | None = None,
    in_var: Tensor | None = None,
    in_weight: Tensor | None = None,
    in_bias: Tensor | None = None,
    in_eps: float = 1e-5,
) -> Tensor:
    """Return each window's maximum of a, as torch.nn.functional.max_pool2d does.

    a = input without `in_mean`, else relu((input - in_mean) / sqrt(in_var + in_eps) * in_weight
    + in_bias). Padding is never a maximum.

    Args:
        input: (N, C, H, W), float32, bfloat16, float16 or float64; any strides, channels_last
            is fastest.
        kernel_size, stride, padding: two integers each; padding at most half of the kernel.
        in_mean, in_var: (C,), the statistics of `input`, or both None.
        in_weight, in_bias: (C,) or None, which means 1 and 0.
        in_eps: added to `in_var`.

    Returns:
        (N, C, H_out, W_out), channels_last, of `input`'s dtype. The gradient goes to the first
        of equal values, in the order of rows; a NaN is a maximum.

    Raises:
        RuntimeError: where an argument's shape, dtype or device does not fit; it names it.
    """
    result: Tensor = torch.ops.fastres.max_pool2d(
        input,
        kernel_size,
        stride,
        padding,
        in_mean,
        in_var,
        to_parameter_dtype(in_weight, input),
        to_parameter_dtype(in_bias, input),
        in_eps,
    )
    return result


def pool_output_shape(
    op: str, input: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]
) -> tuple[int, int, int, int]:
    """(N, C, H_out, W_out), after checking that there is one."""
    check_activation(op, "input", input)
    for name, pair, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
    ):
        check(
            len(pair) == 2 and all(value >= least for value in pair),
            op,
            f"{name} must be two integers >= {least}, got {list(pair)}",
        )
    size = []
    for i in range(2):
        check(
            padding[i] <= kernel_size[i] // 2,
            op,
            f"padding must be at most half of kernel_size {list(kernel_size)}, got {list(padding)}",
        )
        free = input.shape[2 + i] + 2 * padding[i] - kernel_size[i]
        check(
            input.shape[2 + i] > 0 and free >= 0,
            op,
            f"input must be at least one pixel and with its padding at least kernel_size "
            f"{list(kernel_size)} high and wide, got {tuple(input.shape)}",
        )
        size.append(free // stride[i] + 1)
    return input.shape[0], input.shape[1], size[0], size[1]


def _fake(
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    in_mean: Tensor | None,
    in_var: Tensor | None,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    in_eps: float,
) -> Tensor:
    op = "max_pool2d"
    shape = pool_output_shape(op, input, kernel_size, stride, padding)
    prologue = {"in_mean": in_mean, "in_var": in_var, "in_weight": in_weight, "in_bias": in_bias}
    check_prologue(op, input, prologue)
    return new_activation(input, shape)


def _fake_backward(
    dy: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    in_mean: Tensor | None,
    in_var: Tensor | None,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    in_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "max_pool2d_backward"
    shape = pool_output_shape(op, input, kernel_size, stride, padding)
    same = dy.dim() == 4 and all(a == b for a, b in zip(dy.shape, shape, strict=True))
    check(same, op, f"dy must be of shape {shape}, got {tuple(dy.shape)}")
    check_placed_like(op, "dy", dy, "input", input)
    prologue = {"in_mean": in_mean, "in_var": in_var, "in_weight": in_weight, "in_bias": in_bias}
    check_prologue(op, input, prologue)

    def vector(present: bool) -> Tensor:
        return new_vector(input, input.shape[1] if present else 0)

    return (
        new_activation(input, input.shape),
        vector(in_mean is not None),
        vector(in_mean is not None),
        vector(in_weight is not None),
        vector(in_bias is not None),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, ctx.kernel_size, ctx.stride, ctx.padding, *vectors, ctx.in_eps = inputs
    ctx.save_for_backward(input, *vectors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    input, *vectors = ctx.saved_tensors
    dinput, *dvectors = torch.ops.fastres.max_pool2d_backward(
        dy, input, ctx.kernel_size, ctx.stride, ctx.padding, *vectors, ctx.in_eps
    )
    needs = ctx.needs_input_grad
    return (
        dinput if needs[0] else None,
        *(None,) * 3,
        *(d if needed else None for d, needed in zip(dvectors, needs[4:8], strict=True)),
        None,
    )


register_op("max_pool2d", _fake, _backward, _setup_context)
register_op("max_pool2d_backward", _fake_backward)

"""add_relu: relu(input + residual), the end of every residual block, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres.ops._register import register_op
from fastres.ops._shapes import check_activation, check_like, new_activation


def add_relu(input: Tensor, residual: Tensor) -> Tensor:
    """Return relu(input + residual) in one pass over memory.

    Args:
        input: (N, C, H, W), float32, bfloat16, float16 or float64; any strides.
        residual: like `input`.

    Returns:
        (N, C, H, W), channels_last, of `input`'s dtype. NaN passes, as in torch.

    Raises:
        RuntimeError: where an argument's shape, dtype or device does not fit; it names it.
    """
    result: Tensor = torch.ops.fastres.add_relu(input, residual)
    return result


def _fake(input: Tensor, residual: Tensor) -> Tensor:
    check_activation("add_relu", "input", input)
    check_like("add_relu", "residual", residual, "input", input)
    return new_activation(input, input.shape)


def _fake_backward(dy: Tensor, y: Tensor) -> Tensor:
    check_activation("add_relu_backward", "dy", dy)
    check_like("add_relu_backward", "y", y, "dy", dy)
    return new_activation(dy, dy.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    (y,) = ctx.saved_tensors
    gradient = torch.ops.fastres.add_relu_backward(dy, y)
    return gradient, gradient


register_op("add_relu", _fake, _backward, _setup_context)
register_op("add_relu_backward", _fake_backward)

"""avg_pool_linear: a classifier's head, the mean over the pixels and the linear layer after it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.ops._register import register_op
from fastres.ops._shapes import check, check_activation, check_placed_like


def avg_pool_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return linear(input.mean((2, 3)), weight, bias).

    The CPU's kernels do not round the means to 16 bits, and an image's result has the same bits
    in every batch and for every number of threads.

    Args:
        input: (N, C, H, W), float32, bfloat16, float16 or float64; any strides, channels_last
            is fastest.
        weight: (O, C), of `input`'s dtype.
        bias: (O,), of `input`'s dtype, or None.

    Returns:
        (N, O), of `input`'s dtype. NaN and infinity pass, and the mean of no pixels is NaN, as
        in torch.

    Raises:
        RuntimeError: where an argument's shape, dtype or device does not fit; it names it.
    """
    result: Tensor = torch.ops.fastres.avg_pool_linear(input, weight, bias)
    return result


def avg_pool_linear_output(
    op: str, input: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = ""
) -> Tensor:
    """Check the arguments, whose names have the prefix; return an empty result."""
    channels, outputs = input.shape[1], weight.shape[:1]
    check(
        weight.dim() == 2 and weight.shape[1] == channels,
        op,
        f"{prefix}weight must be (O, C) with C = {channels}, got {tuple(weight.shape)}",
    )
    check_placed_like(op, f"{prefix}weight", weight, "input", input)
    if bias is not None:
        check(
            bias.dim() == 1 and bias.shape == outputs,
            op,
            f"{prefix}bias must be ({outputs[0]},), got {tuple(bias.shape)}",
        )
        check_placed_like(op, f"{prefix}bias", bias, "input", input)
    return input.new_empty((input.shape[0], weight.shape[0]))


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    op = "avg_pool_linear"
    check_activation(op, "input", input)
    return avg_pool_linear_output(op, input, weight, bias)


register_op("avg_pool_linear", _fake)

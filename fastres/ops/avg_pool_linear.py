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
    op: str, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Check the arguments; return an empty result."""
    check(
        weight.dim() == 2 and weight.shape[1] == input.shape[1],
        op,
        f"weight must be (O, C) with C = {input.shape[1]}, got {tuple(weight.shape)}",
    )
    check_placed_like(op, "weight", weight, "input", input)
    if bias is not None:
        check(
            bias.dim() == 1 and bias.shape[0] == weight.shape[0],
            op,
            f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}",
        )
        check_placed_like(op, "bias", bias, "input", input)
    return input.new_empty((input.shape[0], weight.shape[0]))


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    op = "avg_pool_linear"
    check_activation(op, "input", input)
    return avg_pool_linear_output(op, input, weight, bias)


register_op("avg_pool_linear", _fake)

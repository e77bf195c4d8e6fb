"""Checks and results' shapes that the shape functions of several ops share.

Errors are RuntimeErrors, as torch's own ops raise, and name the op and the argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.ops.reference import parameter_dtype

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise RuntimeError(f"fastres::{op}: {message}")


def check_activation(op: str, name: str, tensor: Tensor) -> None:
    """`tensor` must be (N, C, H, W) of a floating dtype that the ops know."""
    check(tensor.dim() == 4, op, f"{name} must be (N, C, H, W), got {tensor.dim()} dimensions")
    check(
        tensor.dtype in FLOATING,
        op,
        f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}",
    )


def check_like(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """`tensor` must have the shape, dtype and device of `like`."""
    check_placed_like(op, name, tensor, like_name, like)
    same = tensor.dim() == like.dim() and all(
        a == b for a, b in zip(tensor.shape, like.shape, strict=True)
    )
    check(
        same,
        op,
        f"{name} must have the shape of {like_name}, {tuple(like.shape)}, "
        f"got {tuple(tensor.shape)}",
    )


def check_placed_like(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """`tensor` must have the dtype and device of `like`."""
    check(
        tensor.dtype == like.dtype,
        op,
        f"{name} must have the dtype of {like_name}, {like.dtype}, got {tensor.dtype}",
    )
    check(
        tensor.device == like.device,
        op,
        f"{name} must be on the device of {like_name}, {like.device}, got {tensor.device}",
    )


def check_vectors(op: str, activation: Tensor, channels: int, **vectors: Tensor | None) -> None:
    """Every vector must be (channels,) of the parameter dtype, on the activation's device."""
    dtype = parameter_dtype(activation)
    for name, vector in vectors.items():
        if vector is None:
            continue
        check(
            vector.dim() == 1 and vector.shape[0] == channels,
            op,
            f"{name} must be ({channels},), got {tuple(vector.shape)}",
        )
        check(vector.dtype == dtype, op, f"{name} must be {dtype}, got {vector.dtype}")
        check(
            vector.device == activation.device,
            op,
            f"{name} must be on {activation.device}, got {vector.device}",
        )


def check_prologue(op: str, input: Tensor, vectors: dict[str, Tensor | None]) -> None:
    """The vectors in_mean, in_var, in_weight, in_bias must be (C,) or None, the first two both."""
    given = [name for name, vector in vectors.items() if vector is not None]
    if given and {"in_mean", "in_var"} - set(given):
        raise RuntimeError(f"fastres::{op}: {given[0]} needs both in_mean and in_var")
    check_vectors(op, input, input.shape[1], **vectors)


def conv_output_shape(
    op: str,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[int, int, int, int]:
    """(N, C_out, H_out, W_out) of a convolution, after checking that there is one."""
    check_activation(op, "input", input)
    check_activation(op, "weight", weight)
    check_placed_like(op, "weight", weight, "input", input)
    for name, pair, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        check(
            len(pair) == 2 and all(value >= least for value in pair),
            op,
            f"{name} must be two integers >= {least}, got {list(pair)}",
        )
    c_out, c_in = weight.shape[:2]
    check(
        groups >= 1 and input.shape[1] % groups == 0 and c_out % groups == 0,
        op,
        f"groups must divide {input.shape[1]} input and {c_out} output channels, got {groups}",
    )
    check(
        input.shape[1] == c_in * groups,
        op,
        f"weight must be (C_out, C_in/groups, kh, kw) with C_in/groups = "
        f"{input.shape[1] // groups}, got {tuple(weight.shape)}",
    )
    size = []
    for i in range(2):
        reach = dilation[i] * (weight.shape[2 + i] - 1) + 1
        padded = input.shape[2 + i] + 2 * padding[i]
        check(
            padded >= reach,
            op,
            f"input must be at least {reach} pixels high and wide with its padding, "
            f"got {tuple(input.shape)}",
        )
        size.append((padded - reach) // stride[i] + 1)
    return input.shape[0], c_out, size[0], size[1]


def new_activation(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty channels_last tensor of `shape`: the layout of every op's result."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def new_vector(like: Tensor, channels: int) -> Tensor:
    """An empty (channels,) vector of the parameter dtype."""
    return torch.empty(channels, dtype=parameter_dtype(like), device=like.device)


def to_parameter_dtype(vector: Tensor | None, activation: Tensor) -> Tensor | None:
    """`vector` in the dtype that an op wants beside `activation` (for TorchScript as well)."""
    if vector is None:
        return None
    dtype = torch.float64 if activation.dtype == torch.float64 else torch.float32
    # A call of `to` takes longer than all the checks of an op.
    return vector if vector.dtype == dtype else vector.to(dtype)

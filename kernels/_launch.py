"""What every launcher needs: checks, memory layout, and the tile of an elementwise kernel."""

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INT32_ELEMENTS = 2**31 - 1
MAX_PARTIALS = 1024


def require(condition: bool, op: str, message: str) -> None:
    """Raise ``RuntimeError("fastres::<op>: <message>")`` unless ``condition`` holds."""
    if not condition:
        raise RuntimeError(f"fastres::{op}: {message}")


def require_like(op: str, name: str, tensor: Tensor | None, like_name: str, like: Tensor) -> None:
    """Hold an optional tensor to the shape, dtype and device of another."""
    if tensor is None:
        return
    if tensor.shape != like.shape or tensor.dtype != like.dtype or tensor.device != like.device:
        raise RuntimeError(
            f"fastres::{op}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
            f"expected {like.dtype} {tuple(like.shape)} on {like.device} as {like_name}"
        )


def vectors(op: str, like: Tensor, channels: int, **named: Tensor | None) -> list[Tensor | None]:
    """Check per-channel vectors ``(channels,)`` on ``like``'s device; returns them contiguous."""
    for name, vector in named.items():
        if vector is not None and (vector.shape != (channels,) or vector.device != like.device):
            raise RuntimeError(
                f"fastres::{op}: {name} is {tuple(vector.shape)} on {vector.device}, "
                f"expected ({channels},) on {like.device}"
            )
    return [None if vector is None else vector.contiguous() for vector in named.values()]


def channels_last(tensor: Tensor | None) -> Tensor | None:
    """``(N, C, H, W)`` with its elements dense in N, H, W, C order."""
    return None if tensor is None else tensor.contiguous(memory_format=torch.channels_last)


def empty_channels_last(like: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """An uninitialised channels_last tensor ``(N, C, H, W)`` with ``like``'s dtype and device."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of per-channel vectors that go with activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype that a kernel computes in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def rows_of(tensor: Tensor) -> int:
    """N*H*W of an ``(N, C, H, W)`` tensor.

    Raises:
        RuntimeError: there are 2^31 or more: kernels count rows in 32 bits, elements in 64.
    """
    rows = tensor.shape[0] * tensor.shape[2] * tensor.shape[3]
    if rows > INT32_ELEMENTS - 2**20:
        raise RuntimeError(
            f"fastres: a tensor of shape {tuple(tensor.shape)} has {rows} pixels, expected fewer "
            "than 2^31 in a batch"
        )
    return rows


_cudnn_lock = threading.Lock()
_cudnn_users: list[bool] = []  # of each user the switch before it, the first one's torch's own


@contextlib.contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """Has cuDNN give the same bits every run, without atomics; after the last user as before.

    The switch is the process's: the threads of several devices' backwards share it.
    """
    with _cudnn_lock:
        _cudnn_users.append(torch._C._get_cudnn_deterministic())
        torch._C._set_cudnn_deterministic(True)
    try:
        yield
    finally:
        with _cudnn_lock:
            before = _cudnn_users.pop()
            if not _cudnn_users:
                torch._C._set_cudnn_deterministic(before)


class RowTile(NamedTuple):
    """A tile of a channels_last tensor seen as a matrix of rows (N*H*W) by channels."""

    block_rows: int
    block_channels: int


def row_tile(channels: int, elements: int) -> RowTile:
    """The tile of about ``elements`` elements for a tensor of ``channels`` channels."""
    block_channels = min(64, triton.next_power_of_2(channels))
    return RowTile(elements // block_channels, block_channels)


def is_wide(tensor: Tensor) -> bool:
    """Whether offsets into the tensor need 64 bits; a tile reaches past the end before its mask."""
    return tensor.numel() > INT32_ELEMENTS - 2**20

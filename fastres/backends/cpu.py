"""The CPU's kernels: which algorithms they may use, and which they would.

    fastres.backends.cpu.allow_winograd = False
    with fastres.backends.cpu.flags(allow_winograd=False):
        model(images)

``allow_winograd`` (True at first): whether Winograd's algorithm, which rounds more than the sums it
replaces, may compute convolutions and their gradients. It holds for all threads of the process,
before ``FASTRES_CPU_ALGORITHM``; weights that a model has packed for Winograd's algorithm are left
unused while it is False.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fastres import _C

__all__ = ["allow_winograd", "conv_algorithm", "flags"]

allow_winograd: bool  # a property of this module's class, below


class _Flags(types.ModuleType):
    """A module whose flags are C++'s."""

    @property
    def allow_winograd(self) -> bool:
        return _C.winograd_allowed()

    @allow_winograd.setter
    def allow_winograd(self, allowed: bool) -> None:
        _check_bool("allow_winograd", allowed)
        _C.set_winograd_allowed(allowed)


sys.modules[__name__].__class__ = _Flags


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


@contextmanager
def flags(*, allow_winograd: bool) -> Iterator[None]:
    """Set the flags for as long as the ``with`` lasts, for all threads.

    Raises:
        TypeError: where a flag is not a bool; it names it.
    """
    _check_bool("allow_winograd", allow_winograd)
    before = _C.winograd_allowed()
    _C.set_winograd_allowed(allow_winograd)
    try:
        yield
    finally:
        _C.set_winograd_allowed(before)


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def conv_algorithm(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    training: bool = False,
) -> str:
    """Return the name of the algorithm that would compute a convolution forward, as things are.

    In inference it is that of a fused model, which packs its float32 weights once.

    Args:
        input_size: (N, C_in, H, W).
        weight_size: (C_out, C_in/groups, kh, kw).
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d.
        dtype: of input and weight.
        training: whether the convolution takes its output's statistics (`fastres.ops.conv_stats`).

    Returns:
        One of the names that ``FASTRES_CPU_ALGORITHM`` takes; ``aten`` is torch's convolution.

    Raises:
        RuntimeError: where the arguments are no convolution's; it names the one that is wrong.
    """
    return _C.conv_algorithm(
        list(input_size),
        list(weight_size),
        _pair(stride),
        _pair(padding),
        _pair(dilation),
        groups,
        str(dtype).removeprefix("torch."),
        training,
    )

"""What test_triton_interpreter.py runs with TRITON_INTERPRET=1: addresses past 2^31 elements.

Launchers get tensors of more than 2^31 elements whose memory is never touched: the interpreter's
loads and stores note the addresses instead, and of each grid only the first and the last programs
run. An offset that wraps around in 32 bits leaves its tensor, or misses the tensor's end.
"""

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from fastres import kernels

ROWS, CHANNELS = 2**25 + 100, 64
EPS = 1e-5
GEOMETRY = ([1, 1], [0, 0], [1, 1], 1)


class Memory:
    """In the place of the interpreter's memory: notes every address, and loads zeros."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.tensors: list[Tensor] = []
        self.lowest: dict[int, int] = {}
        self.highest: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def hold(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor

    def note(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        addresses = pointers[np.asarray(mask).astype(bool)]
        if not addresses.size:
            return
        low, high = int(addresses.min()), int(addresses.max())
        for tensor in self.tensors:
            start = tensor.data_ptr()
            if start <= low < start + tensor.nbytes:
                assert high < start + tensor.nbytes, "past the end of a tensor"
                self.lowest[start] = min(low, self.lowest.get(start, low))
                self.highest[start] = max(high, self.highest.get(start, high))
                return
        raise AssertionError(f"address {low} is in no tensor")

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self.note(pointers, mask)
        return np.broadcast_to(other, pointers.shape).astype(dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> None:
        self.note(pointers, mask)

    def check(self) -> None:
        """Every large tensor was used from its first element to its last."""
        large = [tensor for tensor in self.tensors if tensor.numel() > 2**31]
        assert large
        for tensor in large:
            start = tensor.data_ptr()
            assert self.lowest[start] == start
            assert self.highest[start] == start + tensor.nbytes - tensor.itemsize


def ends(*arguments: int) -> Iterable[int]:
    """What `range` gives, of a long one the ends alone."""
    whole = range(*arguments)
    return whole if len(whole) <= 64 else (*whole[:2], *whole[-2:])


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    found = Memory(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", found)
    monkeypatch.setattr(interpreter, "range", ends, raising=False)

    def held(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return functools.wraps(allocate)(lambda *args, **kw: found.hold(allocate(*args, **kw)))

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, held(getattr(owner, name)))
    yield found
    found.check()


def activation(rows: int = ROWS, channels: int = CHANNELS) -> Tensor:
    shape = (1, channels, rows, 1)
    return torch.empty(shape, dtype=torch.float16, memory_format=torch.channels_last)


def vectors(count: int) -> list[Tensor]:
    return [torch.empty(CHANNELS) for _ in range(count)]


def test_add_relu() -> None:
    x = activation()
    kernels.add_relu(x, x)
    kernels.add_relu_backward(x, x)


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
def test_bn_add_relu(projection: bool) -> None:
    z = activation()
    branch = vectors(4) if projection else [None] * 4
    kernels.bn_add_relu(z, *vectors(4), EPS, z, *branch, EPS, True)
    kernels.bn_add_relu_backward(z, z, z, *vectors(3), EPS, z, *branch[:3], EPS, True)


def test_statistics() -> None:
    importlib.import_module("fastres.kernels.channel_stats").channel_stats(activation())


def test_gradient_of_statistics() -> None:
    apply = importlib.import_module("fastres.kernels.conv_backward")._apply
    z = activation()
    apply(z, z, *vectors(3))


def test_max_pool2d() -> None:
    x = activation()
    geometry = ([3, 1], [1, 1], [1, 0])
    kernels.max_pool2d(x, *geometry, *vectors(4), EPS)
    kernels.max_pool2d_backward(x, x, *geometry, *[None] * 4, EPS)


@pytest.mark.parametrize("choice", ["triton:square", "triton:tall", "tma:square", "tma:tall"])
def test_1x1_convolution(choice: str) -> None:
    x = activation()
    weight = torch.empty(64, 64, 1, 1, dtype=torch.float16)
    kernels.conv_stats(x, weight, *vectors(4), EPS, *GEOMETRY, choice)
    kernels.conv_bn_relu(x, weight, None, *vectors(4), EPS, x, *GEOMETRY, True, None, choice)


@pytest.mark.parametrize("choice", ["triton_apply:square+square", "triton:tall+small"])
def test_gradients_of_a_1x1_convolution(choice: str) -> None:
    z = activation()
    weight = torch.empty(64, 64, 1, 1, dtype=torch.float16)
    statistics, before = vectors(3), vectors(4)
    call = (z, *statistics[:2], z, weight, z, statistics[2], *before, EPS, *GEOMETRY)
    kernels.conv_stats_backward(*call, True, True, choice)


def test_3x3_convolution_of_a_small_output() -> None:
    # Of the input alone an offset passes 2^31.
    x = torch.empty(33, 64, 1009, 1009, dtype=torch.float16, memory_format=torch.channels_last)
    weight = torch.empty(16, 64, 3, 3, dtype=torch.float16)
    geometry = ([3, 3], [1, 1], [1, 1], 1)
    kernels.conv_stats(x, weight, *[None] * 4, EPS, *geometry, "triton:small")


def test_gradients_of_a_3x3_convolution_of_a_small_output() -> None:
    x = torch.empty(33, 64, 1009, 1009, dtype=torch.float16, memory_format=torch.channels_last)
    weight = torch.empty(16, 64, 3, 3, dtype=torch.float16)
    z = torch.empty(33, 16, 337, 337, dtype=torch.float16, memory_format=torch.channels_last)
    geometry = ([3, 3], [1, 1], [1, 1], 1)
    statistics = [torch.empty(16) for _ in range(3)]
    call = (z, *statistics[:2], x, weight, z, statistics[2], *[None] * 4, EPS, *geometry)
    kernels.conv_stats_backward(*call, True, True, "triton:small+small")

"""Which of fastres' ops a forward calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class FastresOps(TorchDispatchMode):
    """Records the fastres ops that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastres":
            self.calls.append((func._schema.name.removeprefix("fastres::"), args))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls if name != "pack_conv_weight"]


def ops_of(module: nn.Module, x: Tensor) -> list[str]:
    """Names of the ops of one forward; packing apart."""
    with FastresOps() as recorded:
        module(x)
    return recorded.names


def convolutions_of(module: nn.Module, x: Tensor) -> int:
    """How many convolutions of one forward are fused."""
    return sum(name in ("conv_stats", "conv_bn_relu") for name in ops_of(module, x))

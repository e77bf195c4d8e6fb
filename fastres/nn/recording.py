"""A model's chain, recorded once: in each call only what it was recorded from is compared."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain as concatenated
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import ops
from ..backends import cpu
from .chain import Chain
from .packed import PackedWeights
from .precision import autocast_dtype

# Input sizes that are remembered; a model that sees more records anew.
_MOST = 64


class Source:
    """Modules as they are now: their types, attributes, hooks, parameters and buffers."""

    def __init__(self, model: nn.Module, called: Iterable[nn.Module]) -> None:
        """``called``: those of the model's that its chain stands for."""
        self._children = model._modules
        self._modules = list(called)
        self._kinds = [type(module) for module in self._modules]
        self._dicts: list[dict[str, Any]] = [model._modules]
        self._hooks: list[dict[int, Any]] = []
        for module in self._modules:
            self._dicts += (
                module.__dict__,
                module._parameters,
                module._buffers,
                module._modules,
            )
            self._hooks += (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
        self._values = self._now()

    def holds(self, model: nn.Module) -> bool:
        """Whether all that is as it was. What tensors hold is not looked at."""
        if model._modules is not self._children or any(self._hooks):
            return False
        now = self._now()
        return (
            len(now) == len(self._values)
            and all(map(is_, now, self._values))
            and all(map(is_, map(type, self._modules), self._kinds))
        )

    def _now(self) -> list[Any]:
        return list(concatenated.from_iterable(map(dict.values, self._dicts)))


class _Recorded(NamedTuple):
    """What ``ops.conv_chain`` is given besides the input."""

    tensors: list[Tensor]
    program: list[int]
    eps: list[float]
    packed: list[tuple[PackedWeights, Any]]  # with the convolutions whose weights they are
    entries: list[Any]  # of each of these, as it was


class Recordings:
    """A model's chains, by the sizes and types that they depend on. Copies start empty."""

    def __init__(self) -> None:
        self._kept: tuple[Source, dict[Any, _Recorded]] | None = None

    def compute(self, model: nn.Module, x: Tensor) -> Tensor | None:
        """The chain's result, if it was recorded for the like of x and all is as it was."""
        kept = self._kept
        if kept is None:
            return None
        recorded = kept[1].get(_key(x))
        if recorded is None or not kept[0].holds(model):
            return None
        for (packed, conv), entry in zip(recorded.packed, recorded.entries, strict=True):
            if not packed.holds(conv, entry):
                return None
        dtype = autocast_dtype(x)
        return ops.conv_chain(
            x if dtype is None else x.to(dtype), recorded.tensors, recorded.program, recorded.eps
        )

    def keep(self, model: nn.Module, called: Iterable[nn.Module], x: Tensor, chain: Chain) -> None:
        """Keep what was recorded from these modules for x, if that can be compared later."""
        entries = [packed.entry(conv) for packed, conv in chain.packed]
        if chain.converted or None in entries:
            return
        kept = self._kept
        if kept is None or not kept[0].holds(model) or len(kept[1]) >= _MOST:
            kept = self._kept = (Source(model, called), {})
        kept[1][_key(x)] = _Recorded(chain.tensors, chain.program, chain.eps, chain.packed, entries)

    def clear(self) -> None:
        self._kept = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Recordings, ()


def _key(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, autocast_dtype(x), cpu.allow_winograd

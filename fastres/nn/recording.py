"""A model's chain, recorded once: in each call only what it was recorded from is compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..backends import cpu
from ..ops.kept_chain import KeptChain, all_empty, same_types, same_values
from .chain import Chain
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
        self._values = [value for values in self._dicts for value in values.values()]

    def holds(self, model: nn.Module) -> bool:
        """Whether all that is as it was. What tensors hold is not looked at."""
        return (
            model._modules is self._children
            and all_empty(self._hooks)
            and same_values(self._dicts, self._values)
            and same_types(self._modules, self._kinds)
        )


class _Recorded(NamedTuple):
    """A chain, what it was recorded from, and where the packed weights that it takes are kept."""

    source: Source
    chain: KeptChain
    packed: list[dict[Any, Any]]
    entries: list[Any]  # all that is kept there

    def holds(self, model: nn.Module) -> bool:
        """Whether nothing was changed or dropped since then, and the weights are what they were."""
        return (
            self.source.holds(model)
            and same_values(self.packed, self.entries)
            and self.chain.stays()
        )


class Recordings:
    """A model's chains, by the sizes and types that they depend on. Copies start empty."""

    def __init__(self) -> None:
        self._kept: dict[Any, _Recorded] = {}

    def compute(self, model: nn.Module, x: Tensor) -> Tensor | None:
        """The chain's result, if it was recorded for the like of x and all is as it was."""
        recorded = self._kept.get(_key(x))
        if recorded is None or not recorded.holds(model):
            return None
        dtype = autocast_dtype(x)
        return recorded.chain.compute(x if dtype is None else x.to(dtype))

    def keep(self, model: nn.Module, called: Iterable[nn.Module], x: Tensor, chain: Chain) -> None:
        """Keep what was recorded from these modules for x, if that can be compared later."""
        recorded = _recorded(Source(model, called), chain)
        if recorded is None:
            return
        kept = {key: other for key, other in self._kept.items() if other.holds(model)}
        if len(kept) >= _MOST:
            kept = {}
        kept[_key(x)] = recorded
        self._kept = kept

    def clear(self) -> None:
        self._kept = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Recordings, ()


def _recorded(source: Source, chain: Chain) -> _Recorded | None:
    if chain.converted:
        return None
    found = [(packed, conv, packed.entry(conv)) for packed, conv in chain.packed]
    entries = [entry for _, _, entry in found if entry is not None]
    if len(entries) < len(found):
        return None
    watched = [entry.weight for entry in entries]
    kept = KeptChain(chain.input, chain.tensors, chain.program, chain.eps, *chain.fc, watched)
    # Another thread may have written to a weight by now.
    if not all(packed.holds(conv, entry) for packed, conv, entry in found):
        return None
    dicts = list({id(packed): packed.entries for packed, _ in chain.packed}.values())
    values = [entry for entries in dicts for entry in entries.values()]
    return _Recorded(source, kept, dicts, values)


def _key(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, autocast_dtype(x), cpu.allow_winograd

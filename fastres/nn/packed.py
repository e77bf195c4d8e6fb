"""Convolution weights packed for the CPU's inference kernel, kept for as long as they hold."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import ops
from ..backends import cpu


class _Entry(NamedTuple):
    """One weight's packings."""

    key: tuple[Any, ...]  # of the weight's contents and the convolution's geometry
    weight: Tensor
    memory: Tensor  # keeps the weight's address from being given to another
    casts: dict[torch.dtype, Tensor]  # the weight in other dtypes, as autocast wants it
    forms: dict[tuple[int, torch.dtype], Tensor]  # by length, which tells a dtype's forms apart
    # By the input's (N, H, W), the dtype, and what is allowed.
    by_size: dict[tuple[Any, ...], Tensor]


def _key(conv: Any, weight: Tensor) -> tuple[Any, ...]:
    return (
        weight.data_ptr(),
        weight._version,
        weight.shape,
        weight.stride(),
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
    )


# Input sizes that are remembered for a weight; a model that sees more chooses anew.
_MOST_SIZES = 64


class PackedWeights:
    """Convolution weights in the forms of the CPU's inference kernels, for as long as they hold.

    An entry is used only if the weight is the same tensor, at the same address and version, with
    the same layout; the entry keeps that memory alive, so the address can't be given to another.
    Optimizers with ``fused=True`` leave the version as it was, so every step drops the entries of
    its parameters. Writes through ``weight.data`` escape this, so owners also clear it in
    ``train()`` and the like. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._entries: dict[nn.Module, _Entry] = {}
        _ALL.add(self)

    def get(
        self, conv: Any, weight: Tensor, size: tuple[int, int, int], dtype: torch.dtype
    ) -> Tensor | None:
        """The packed form of ``weight`` in ``dtype`` for inputs of (N, H, W) ``size``."""
        entry = self._entry(conv, weight)
        if entry is None:
            return None
        kind = (size, dtype, cpu.allow_winograd)
        packed = entry.by_size.get(kind)
        if packed is None:
            packed = self._pack(conv, entry, size, dtype)
            if len(entry.by_size) >= _MOST_SIZES:
                entry.by_size.clear()
            entry.by_size[kind] = packed
        return packed

    def cast(self, conv: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """``weight`` in ``dtype``, without gradients."""
        entry = self._entry(conv, weight)
        if entry is None:
            return weight.to(dtype)
        return self._cast(entry, dtype)

    def _cast(self, entry: _Entry, dtype: torch.dtype) -> Tensor:
        if dtype == entry.weight.dtype:
            return entry.weight
        weight = entry.casts.get(dtype)
        if weight is None:
            weight = entry.casts[dtype] = entry.weight.detach().to(dtype)
        return weight

    def _entry(self, conv: Any, weight: Tensor) -> _Entry | None:
        """The entry of ``weight`` as it is now, made if out of date; None where none can be."""
        if weight.is_inference() or "_is_fsdp_managed_module" in conv.__dict__:
            return None  # without a version, or gathered into the same: a change can't be seen
        key = _key(conv, weight)
        entry = self._entries.get(conv)
        if entry is None or entry.weight is not weight or entry.key != key:
            entry = self._entries[conv] = _Entry(key, weight, weight.detach(), {}, {}, {})
        return entry

    def entry(self, conv: Any) -> _Entry | None:
        """What is kept of conv's weight, for ``holds``."""
        return self._entries.get(conv)

    @property
    def entries(self) -> dict[nn.Module, _Entry]:
        """All that is kept, by convolution."""
        return self._entries

    def holds(self, conv: Any, entry: _Entry) -> bool:
        """Whether nothing was dropped since then, and the weight is what it was."""
        return self._entries.get(conv) is entry and entry.key == _key(conv, entry.weight)

    def _pack(
        self, conv: Any, entry: _Entry, size: tuple[int, int, int], dtype: torch.dtype
    ) -> Tensor:
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups, size)
        weight = self._cast(entry, dtype)
        form = (ops.packed_conv_weight_numel(weight, *geometry), dtype)
        packed = entry.forms.get(form)
        if packed is None:
            with torch.no_grad():
                packed = ops.pack_conv_weight(weight, *geometry)
            entry.forms[form] = packed
        return packed

    def clear(self) -> None:
        self._entries.clear()

    def drop(self, weights: set[int]) -> None:
        """Drop the entries of the weights with these ids."""
        for conv, entry in list(self._entries.items()):
            if id(entry.weight) in weights:
                self._entries.pop(conv, None)  # another thread may have

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PackedWeights, ()


_ALL: WeakSet[PackedWeights] = WeakSet()


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # Compiled steps tell of their writes, but for the fused, which torch does not compile.
    if not torch.compiler.is_compiling() or any(g.get("fused") for g in optimizer.param_groups):
        _drop(optimizer)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _drop(optimizer: Optimizer) -> None:
    groups = optimizer.param_groups
    stepped = {id(p) for group in groups for p in group["params"] if p.requires_grad}
    for packed in list(_ALL):
        packed.drop(stepped)


register_optimizer_step_post_hook(_after_step)

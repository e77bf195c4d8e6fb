"""Convolution weights packed for the CPU's inference kernel, kept for as long as they hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops


class PackedWeights:
    """Convolution weights in the layout of the CPU's inference kernel, for as long as they hold.

    An entry is used only if the weight is the same tensor, at the same address and version, with
    the same layout; the entry keeps that memory alive, so the address can't be given to another.
    Writes through ``weight.data`` escape this, so owners also clear it in ``train()`` and the like.
    Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._entries: dict[nn.Module, tuple[tuple[Any, ...], Tensor, Tensor, Tensor]] = {}

    def get(self, conv: Any, weight: Tensor) -> Tensor | None:
        """The packed form of ``weight``, made if it is missing or no longer true."""
        if weight.is_inference():
            return None  # has no version counter: a change could not be seen
        key = (
            weight.data_ptr(),
            weight._version,
            weight.shape,
            weight.stride(),
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        entry = self._entries.get(conv)
        if entry is not None and entry[1] is weight and entry[0] == key:
            return entry[3]
        with torch.no_grad():
            packed = ops.pack_conv_weight(
                weight, conv.stride, conv.padding, conv.dilation, conv.groups
            )
        self._entries[conv] = (key, weight, weight.detach(), packed)
        return packed

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PackedWeights, ()

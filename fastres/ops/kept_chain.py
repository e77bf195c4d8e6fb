"""A chain that is handed over once, for many calls in eager mode, and what tells that it holds.

A model's every call is the same chain of hundreds of tensors and numbers. To go through them, in
Python or in the dispatcher, takes the longer the less of the caches a network's weights leave.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from fastres import _C
from fastres._C import all_empty, same_types, same_values

__all__ = ["KeptChain", "all_empty", "same_types", "same_values"]


class KeptChain:
    """``conv_chain`` for inputs of the sizes and dtype of one, on the CPU and without gradients.

    Copies and pickles of it there are none: make another.
    """

    def __init__(
        self,
        input: Tensor,
        tensors: list[Tensor],
        program: list[int],
        eps: list[float],
        fc_weight: Tensor | None,
        fc_bias: Tensor | None,
        watched: list[Tensor],
    ) -> None:
        """``watched``: tensors of which `stays` tells."""
        self._chain: int = torch.ops.fastres.keep_conv_chain(
            input, tensors, program, eps, fc_weight, fc_bias, watched
        )
        self._watched = watched
        self._versions = [tensor._version for tensor in watched]
        weakref.finalize(self, _C.drop_conv_chain, self._chain).atexit = False

    def stays(self) -> bool:
        """Whether no watched tensor has been written to, or given other memory or strides."""
        versions = [tensor._version for tensor in self._watched]
        return versions == self._versions and _C.conv_chain_stays(self._chain)

    def compute(self, input: Tensor) -> Tensor:
        """``conv_chain`` of the input."""
        result: Tensor = torch.ops.fastres.kept_conv_chain(input, self._chain)
        return result

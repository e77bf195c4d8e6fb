"""Units that wait: recorded one after the other, then computed in one call of an op.

A model in eval mode whose units are all fused ones gives its blocks a ``Deferred`` in the place of
a tensor. The same functions that would compute a unit then record it, and what comes out at the
end is computed by ``ops.conv_chain``. Which models can is for the model to say (``chains``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_compiling
from torch.jit import is_tracing

from .. import ops
from ..ops._shapes import to_parameter_dtype
from .norm import affine
from .packed import PackedWeights
from .precision import autocast_dtype

_DTYPES = (torch.float32, torch.bfloat16)
# A unit's max-pool in a program: its kernel size, stride and padding.
_NO_POOL = (0,) * 6


class Deferred:
    """A unit's result ``(N, C, H, W)`` that is not computed yet; the channels are the unit's."""

    def __init__(self, chain: Chain, index: int, size: tuple[int, int, int]) -> None:
        self.chain = chain
        self.index = index
        self.size = size  # (N, H, W)

    def conv_bn(
        self,
        conv: Any,
        bn: Any,
        packed_weights: PackedWeights,
        *,
        relu: bool,
        residual: Deferred | None = None,
    ) -> Deferred:
        """``[relu](bn(conv(self)) [+ residual])`` with the running statistics, later."""
        weight = conv._parameters["weight"]
        buffers = bn._buffers
        chain = self.chain
        dtype = chain.input.dtype
        chain.packed.append((packed_weights, conv))
        chain.program += (self.index, -1 if residual is None else residual.index)
        chain.add(packed_weights.cast(conv, weight, dtype) if chain.casts else weight)
        for vector in (
            conv._parameters["bias"],
            buffers["running_mean"],
            buffers["running_var"],
            *affine(bn),
        ):
            converted = to_parameter_dtype(vector, chain.input)
            chain.converted |= converted is not vector
            chain.add(converted)
        chain.add(packed_weights.get(conv, weight, self.size, dtype))
        stride, padding, dilation = conv.stride, conv.padding, conv.dilation
        chain.program += (*stride, *padding, *dilation, conv.groups, relu, *_NO_POOL)
        chain.eps.append(bn.eps)
        n, *size = self.size
        height, width = (
            (size[i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i]
            + 1
            for i in range(2)
        )
        return Deferred(chain, len(chain.eps), (n, height, width))

    def max_pool(self, kernel_size: list[int], stride: list[int], padding: list[int]) -> Deferred:
        """Its windows' maxima, in its place: it must be the last unit's and of no other use."""
        self.chain.program[-len(_NO_POOL) :] = (*kernel_size, *stride, *padding)
        n, *size = self.size
        height, width = (
            (size[i] + 2 * padding[i] - kernel_size[i]) // stride[i] + 1 for i in range(2)
        )
        return Deferred(self.chain, self.index, (n, height, width))

    def compute(self, fc: Any = None) -> Tensor:
        """The result, which must be that of the last unit, or fc of its mean over the pixels."""
        chain = self.chain
        if fc is not None:
            chain.fc = (fc._parameters["weight"], fc._parameters["bias"])
        return ops.conv_chain(chain.input, chain.tensors, chain.program, chain.eps, *chain.fc)


class Chain:
    """What ``ops.conv_chain`` is given, while it is recorded."""

    def __init__(self, input: Tensor) -> None:
        dtype = autocast_dtype(input)
        self.casts = dtype is not None
        self.input = input if dtype is None else input.to(dtype)
        self.tensors: list[Tensor] = []
        self.program: list[int] = []
        self.eps: list[float] = []
        self.fc: tuple[Tensor | None, Tensor | None] = (None, None)
        # Where each unit's weights are kept, and whether any vector is a copy.
        self.packed: list[tuple[PackedWeights, Any]] = []
        self.converted = False

    def start(self) -> Deferred:
        """The input, from which the first unit is taken."""
        n, _, height, width = self.input.shape
        return Deferred(self, 0, (n, height, width))

    def add(self, tensor: Tensor | None) -> None:
        """The next of a unit's tensors, or none."""
        if tensor is None:
            self.program.append(-1)
        else:
            self.program.append(len(self.tensors))
            self.tensors.append(tensor)


def chains(x: Any) -> bool:
    """Whether units of x may wait: a plain tensor without gradients, and nobody who looks on.

    A compiler, a tracer, or a mode of torch's that sees every op is to see every unit.
    """
    return (
        type(x) is Tensor
        and not is_grad_enabled()
        and x.is_cpu
        and (autocast_dtype(x) or x.dtype) in _DTYPES
        and not is_compiling()
        and not is_tracing()
        and _len_torch_dispatch_stack() == 0
        and _len_torch_function_stack() == 0
        and not is_functorch_wrapped_tensor(x)
    )

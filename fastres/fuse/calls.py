"""What the generated forwards of `region` call besides the functions of `fastres.nn`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from ..nn import finish
from ..nn.chain import Chain, Deferred, chains
from ..nn.conv_bn import conv_bn, conv_bn_add_relu, is_untouched, shows_modules
from ..nn.precision import autocast_dtype
from ..nn.units import folded

_RELU = nn.ReLU()


def plain_relu() -> nn.Module:
    """What stands for a ReLU that is a function."""
    return _RELU


def add_relu(relu: Any, x: Any, y: Any) -> Any:
    """``relu(x + y)``, in one pass where both are (N, C, H, W) of one type."""
    if (
        is_untouched(relu, nn.ReLU)
        and not shows_modules(x)
        and not _has_any_global_hook()
        and x.dim() == 4
        and _same_shape(x, y)
        and x.dtype == y.dtype
        and x.dtype.is_floating_point
    ):
        return ops.add_relu(x, y)
    return relu(x + y)


def unit_add_relu(conv: Any, bn: Any, relu: Any, x: Any, y: Any, packed: Any) -> Any:
    """``relu(bn(conv(x)) + y)``, in one pass unless y is broadcast or of another type."""
    if not isinstance(y, Tensor) or _is_summand(conv, x, y):
        return conv_bn_add_relu(conv, bn, relu, x, y, packed)
    return relu(finish(conv_bn(conv, bn, x, packed), relu=False) + y)


def folded_add_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    y: Tensor,
) -> Tensor:
    """The same of ``folded``, for TorchScript."""
    fits = y.dim() == 4 and y.dtype == x.dtype and y.size(0) == x.size(0)
    if fits:
        fits = y.size(1) == weight.size(0)
        for i in range(2):
            size = x.size(2 + i) + 2 * padding[i] - dilation[i] * (weight.size(2 + i) - 1) - 1
            fits = fits and y.size(2 + i) == size // stride[i] + 1
    residual: Tensor | None = None
    if fits:
        residual = y
    out = folded(
        x, weight, bias, running_mean, running_var, bn_weight, bn_bias, eps,
        stride, padding, dilation, groups, fits, residual,
    )  # fmt: skip
    if fits:
        return out
    return torch.relu(out + y)


def start_chain(x: Any, *modules: Any) -> Any:
    """x, or where all these modules' units may wait, what they are recorded from."""
    if chains(x) and not _has_any_global_hook() and all(chains_now(module) for module in modules):
        return Chain(x).start()
    return x


def end_chain(y: Any, x: Any) -> Any:
    """What start_chain's modules made of x, computed if it was this chain that waited."""
    return y.compute() if isinstance(y, Deferred) and not isinstance(x, Deferred) else y


def chains_now(module: Any) -> bool:
    """Whether a module that can chain, or a Sequential of such, would do so now."""
    if type(module) is nn.Sequential:
        return is_untouched(module, nn.Sequential) and all(chains_now(m) for m in module)
    return is_untouched(module, type(module)) and hasattr(module, "chains") and module.chains()


def _is_summand(conv: Any, x: Any, y: Tensor) -> bool:
    """Whether y has the shape and the type of conv's result."""
    x = x if isinstance(x, Tensor) else x.z
    if x.dim() != 4:
        return False
    dtype = autocast_dtype(x) or x.dtype
    size = [
        (x.shape[2 + i] + 2 * conv.padding[i] - conv.dilation[i] * (conv.kernel_size[i] - 1) - 1)
        // conv.stride[i]
        + 1
        for i in range(2)
    ]
    return y.dtype == dtype and _has_shape(y, (x.shape[0], conv.out_channels, *size))


def _same_shape(x: Tensor, y: Tensor) -> bool:
    return _has_shape(y, tuple(x.shape))


def _has_shape(y: Tensor, shape: tuple[Any, ...]) -> bool:
    if not torch.jit.is_tracing():
        return y.dim() == len(shape) and all(a == b for a, b in zip(y.shape, shape, strict=True))
    with warnings.catch_warnings():  # of the tracer's, that this holds for these sizes alone
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return y.dim() == len(shape) and all(
            bool(a == b) for a, b in zip(y.shape, shape, strict=True)
        )

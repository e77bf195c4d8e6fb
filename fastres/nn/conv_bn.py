"""The unit that a ResNet is made of: ``relu(bn(conv(x)) [+ shortcut])``.

The functions take the ``nn.Conv2d``, ``nn.BatchNorm2d`` and ``nn.ReLU`` that a block owns. Where
these are exactly that, the fused ops compute the unit; where anything is attached to them (hooks,
a parametrization, another type in their place) the modules themselves are called, so that every
tool sees what it expects. Which of the two is decided anew in every call.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from ..ops.reference import in_transform
from .chain import Deferred
from .norm import ACTIVATED, FROZEN, affine, has_relu, is_frozen, kind_of, uses_batch_statistics
from .packed import PackedWeights
from .precision import autocast_dtype
from .sync import synchronised, synchronises

# A block's child: what it should be stands in its name, what it is only a check can tell.
Module: TypeAlias = Any


class Pending(NamedTuple):
    """A convolution's output ``z`` ``(N, C, H, W)`` whose BatchNorm is left to its reader.

    The next convolution applies it (and the ReLU) while it loads z, or the block's last pass does.
    """

    z: Tensor
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def conv_bn_relu(
    conv: Module,
    bn: Module,
    relu: Module | None,
    x: Tensor | Pending | Deferred,
    packed: PackedWeights,
) -> Tensor | Pending | Deferred:
    """``relu(bn(conv(x)))``, with BatchNorm and ReLU still pending if it uses batch statistics.

    ``relu`` is None where bn ends in one of its own.
    """
    if isinstance(x, Deferred):
        return x.conv_bn(conv, bn, packed, relu=True)
    if not (fuses(conv, bn, x) and rectifies(bn, relu)):
        out = bn(conv(finish(x, relu=True)))
        return out if relu is None else relu(out)
    if uses_batch_statistics(bn):
        return _conv_stats(conv, bn, x)
    return _conv_bn(conv, bn, finish(x, relu=True), None, True, packed)


def conv_bn(
    conv: Module, bn: Module, x: Tensor | Pending | Deferred, packed: PackedWeights
) -> Tensor | Pending | Deferred:
    """``bn(conv(x))``, with BatchNorm still pending if it uses batch statistics."""
    if isinstance(x, Deferred):
        return x.conv_bn(conv, bn, packed, relu=False)
    if not fuses(conv, bn, x) or has_relu(bn):
        return bn(conv(finish(x, relu=True)))
    if uses_batch_statistics(bn):
        return _conv_stats(conv, bn, x)
    return _conv_bn(conv, bn, finish(x, relu=True), None, False, packed)


def conv_bn_add_relu(
    conv: Module,
    bn: Module,
    relu: Module,
    x: Tensor | Pending | Deferred,
    shortcut: Tensor | Pending | Deferred,
    packed: PackedWeights,
    recompute: int = 0,
) -> Any:
    """``relu(bn(conv(x)) + shortcut)``: the end of a block. For ``recompute`` see ``finish``.

    A tensor, or ``Deferred`` where x is.
    """
    if isinstance(x, Deferred):
        return x.conv_bn(conv, bn, packed, relu=True, residual=shortcut)
    if not (fuses(conv, bn, x) and is_untouched(relu, nn.ReLU)) or has_relu(bn):
        return relu(bn(conv(finish(x, relu=True))) + finish(shortcut, relu=False))
    if uses_batch_statistics(bn):
        out = _conv_stats(conv, bn, x)
        return finish(out, relu=True, shortcut=shortcut, recompute=recompute)
    return _conv_bn(conv, bn, finish(x, relu=True), finish(shortcut, relu=False), True, packed)


def project(
    downsample: Module | None, x: Tensor | Deferred, packed: PackedWeights
) -> Tensor | Pending | Deferred:
    """A block's shortcut: x itself, a 1x1 convolution with BatchNorm, or any other module."""
    if downsample is None:
        return x
    pair = as_conv_bn(downsample)
    if pair is None or _has_any_global_hook():
        return downsample(x)
    return conv_bn(*pair, x, packed)


def finish(
    x: Tensor | Pending,
    *,
    relu: bool,
    shortcut: Tensor | Pending | None = None,
    recompute: int = 0,
) -> Tensor:
    """Apply a pending BatchNorm (+ shortcut) (+ ReLU) in one pass; a tensor is finished already.

    Of as many results in a row as ``recompute`` says, each the next one's shortcut, none is kept
    for the backward, which computes them again.
    """
    if not isinstance(x, Pending):
        return x
    residual = shortcut.z if isinstance(shortcut, Pending) else shortcut
    if residual is not None and residual.dtype != x.z.dtype:
        residual, recompute = residual.to(x.z.dtype), 0  # a copy that nobody else keeps
    # Not in a compiler's hands, which choose themselves what to keep, and not for torch.func.
    eager = not torch.compiler.is_compiling() and not torch.jit.is_tracing() and not in_transform()
    bn_add_relu = ops.bn_add_relu
    if x.z.requires_grad and eager and recompute > ops.in_a_row(residual):
        bn_add_relu = ops.bn_add_relu_recomputed
    if isinstance(shortcut, Pending):
        return bn_add_relu(*x, *shortcut, relu)
    return bn_add_relu(*x, residual, None, None, None, None, 0.0, relu)


def kept_anyway(shortcut: Tensor | Pending, x: Tensor) -> bool:
    """Whether a convolution keeps the shortcut of a block with the input x for its own gradient."""
    return shortcut is x or isinstance(shortcut, Pending)


def is_untouched(module: Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` is ``kind.forward`` and nothing else: no subclass, hook, patch."""
    return (
        (type(module) is kind or kind_of(module) is kind)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
    )


def is_watched() -> bool:
    """Whether every module has to be called: by a global hook, or for forward-mode derivatives."""
    return _has_any_global_hook() or forward_ad._current_level >= 0


def fuses(conv: Module, bn: Module, x: Any = None) -> bool:
    """Whether the fused ops say the same as calling ``conv`` and ``bn``, to any observer."""
    return (
        is_untouched(conv, nn.Conv2d)
        and kind_of(bn) in FROZEN
        and is_untouched(bn, kind_of(bn))
        and (kind_of(bn) not in ACTIVATED or _ends_plainly(bn))
        and conv.padding_mode == "zeros"
        and type(conv.padding) is tuple
        # Tools that take the parameters out of a module leave plain attributes behind.
        and "weight" in conv._parameters
        and "weight" in (bn._buffers if is_frozen(bn) else bn._parameters)
        and "running_mean" in bn._buffers
        # What is left to type promotion when a frozen one's vectors have another type.
        and (not is_frozen(bn) or _dtype_of(conv) == bn._buffers["weight"].dtype)
        # A bias has no effect before batch statistics, but it has a gradient (of rounding errors).
        and (conv._parameters["bias"] is None or not uses_batch_statistics(bn))
        and not is_watched()
        and not shows_modules(x)
    )


def shows_modules(x: Any) -> bool:
    """Whether a graph is made of x that is to show the modules: torch.fx's, or one for ONNX."""
    return isinstance(x, Proxy) or (
        (torch.compiler.is_compiling() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export()
    )


def rectifies(bn: Module, relu: Module | None) -> bool:
    """Whether calling ``relu``, or what bn ends in where that is None, is ReLU and nothing else."""
    return has_relu(bn) if relu is None else is_untouched(relu, nn.ReLU)


def _ends_plainly(bn: Module) -> bool:
    """Whether a BatchNorm with a ``drop`` and an ``act`` drops nothing and ends in ReLU at most."""
    act, drop = bn._modules.get("act"), bn._modules.get("drop")
    return is_untouched(drop, nn.Identity) and (
        is_untouched(act, nn.ReLU) or is_untouched(act, nn.Identity)
    )


def as_conv_bn(module: Module | None) -> tuple[Module, Module] | None:
    """The two modules of ``nn.Sequential(conv, bn)``, or None if it is anything else."""
    if module is None or not is_untouched(module, nn.Sequential):
        return None
    children = tuple(module.children())
    return (children[0], children[1]) if len(children) == 2 else None


def _conv_bn(
    conv: Module,
    bn: Module,
    x: Tensor,
    residual: Tensor | None,
    relu: bool,
    packed_weights: PackedWeights,
) -> Tensor:
    """One pass with the running statistics: ``[relu](bn(conv(x)) [+ residual])``."""
    parameter = weight = conv._parameters["weight"]
    keeps = type(parameter) is nn.Parameter and parameter.is_cpu
    keeps = keeps and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
        if keeps and not torch.is_grad_enabled():
            weight = packed_weights.cast(conv, parameter, dtype)
        else:
            weight = weight.to(dtype)
    if residual is not None:
        residual = residual.to(x.dtype)
    packed = None
    if torch.jit.is_tracing():
        # In the graph, so that freezing folds it and a later change of the weight is still seen.
        packed = ops.pack_conv_weight(weight, conv.stride, conv.padding, conv.dilation, conv.groups)
    elif keeps and weight.dtype in (torch.float32, torch.bfloat16):
        n, _, height, width = x.shape
        packed = packed_weights.get(conv, parameter, (n, height, width), weight.dtype)
    buffers = bn._buffers
    return ops.conv_bn_relu(
        x,
        weight,
        conv._parameters["bias"],
        buffers["running_mean"],
        buffers["running_var"],
        *affine(bn),
        bn.eps,
        residual,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        relu,
        packed,
    )


def _conv_stats(conv: Module, bn: Module, x: Tensor | Pending) -> Pending:
    """The convolution and its batch statistics; updates the running ones as ``bn`` would."""
    weight = conv._parameters["weight"]
    prologue: tuple[Any, Any, Any, Any, Any] = (None, None, None, None, 0.0)
    if isinstance(x, Pending):
        z, prologue = x.z, x[1:]
    else:
        z = x
    dtype = autocast_dtype(z)
    if dtype is not None:
        z, weight = z.to(dtype), weight.to(dtype)
    z, mean, var = ops.conv_stats(
        z, weight, *prologue, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    count = z.size(0) * z.size(2) * z.size(3)
    if type(bn) is nn.SyncBatchNorm and bn.training and synchronises(bn):
        mean, var, total = synchronised(mean, var, count, bn.process_group)
        if bn.track_running_stats:
            _update_running_statistics(bn, mean, var, total)
        return Pending(z, mean, var, bn._parameters["weight"], bn._parameters["bias"], bn.eps)
    if count == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {z.size()}"
        )
    if bn.training and bn.track_running_stats:
        _update_running_statistics(bn, mean, var, count)
    return Pending(z, mean, var, bn._parameters["weight"], bn._parameters["bias"], bn.eps)


@torch.no_grad()
def _update_running_statistics(bn: Module, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
    """As ``nn.BatchNorm2d``: moving or (momentum None) cumulative average, unbiased variance."""
    momentum, batches = bn.momentum, bn.num_batches_tracked
    if batches is not None:
        batches.add_(1)
    if momentum is None:
        momentum = 0.0 if batches is None else batches.to(mean.dtype).reciprocal()
    if isinstance(count, int) and count == 0:
        return
    unbiased = var * (count / (count - 1))
    for running, batch in ((bn.running_mean, mean), (bn.running_var, unbiased)):
        running.copy_(torch.lerp(running.to(batch.dtype), batch, momentum))


def _dtype_of(conv: Module) -> torch.dtype:
    """The type of conv's result, which autocast may change."""
    weight = conv._parameters["weight"]
    return autocast_dtype(weight) or weight.dtype

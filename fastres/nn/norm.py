"""The BatchNorms that the fused ops compute, and where each keeps what it holds."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

# By type: whether it uses its running statistics in training too, all it holds being buffers.
FROZEN: dict[type[nn.Module], bool] = {
    nn.BatchNorm2d: False,
    nn.SyncBatchNorm: False,
    FrozenBatchNorm2d: True,
}
# Those of timm's, which end in a `drop` and an `act` of their own.
ACTIVATED: set[type[nn.Module]] = set()


def know_timm() -> None:
    """Take in timm's BatchNorms, where timm is in use."""
    timm = sys.modules.get("timm.layers.norm_act")
    for name, frozen in (("BatchNormAct2d", False), ("FrozenBatchNormAct2d", True)):
        kind = getattr(timm, name, None)
        if kind is not None:
            FROZEN[kind] = frozen
            ACTIVATED.add(kind)


def kind_of(module: Any) -> type:
    """type(module), or that of the module which torch.export's stand-in stands for.

    It shows such of all the modules of a model that has one of them in two places.
    """
    kind = type(module)
    if kind in FROZEN or torch.compiler.is_dynamo_compiling():
        return kind
    bases = kind.__bases__
    return bases[1] if len(bases) == 2 and bases[0].__name__ == "AttrProxy" else kind


def is_frozen(bn: Any) -> bool:
    """Whether bn uses its running statistics in training too, all it holds being buffers."""
    return FROZEN[kind_of(bn)]


def affine(bn: Any) -> tuple[Tensor | None, Tensor | None]:
    """BatchNorm's weight and bias (C,), or None."""
    held = bn._buffers if is_frozen(bn) else bn._parameters
    return held["weight"], held["bias"]


def uses_batch_statistics(bn: Any) -> bool:
    """Whether bn normalises by the statistics of its input, as in training."""
    return not is_frozen(bn) and (bn.training or bn._buffers["running_mean"] is None)


def has_relu(bn: Any) -> bool:
    """Whether bn ends in a ReLU of its own."""
    return kind_of(bn) in ACTIVATED and kind_of(bn.act) is nn.ReLU

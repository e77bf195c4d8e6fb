"""The BatchNorms that the fused ops compute, and where each keeps what it holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d


def is_frozen(bn: Any) -> bool:
    """Whether bn uses its running statistics in training too, all it holds being buffers."""
    return type(bn) is FrozenBatchNorm2d


def affine(bn: Any) -> tuple[Tensor | None, Tensor | None]:
    """BatchNorm's weight and bias (C,), or None."""
    held = bn._buffers if is_frozen(bn) else bn._parameters
    return held["weight"], held["bias"]


def uses_batch_statistics(bn: Any) -> bool:
    """Whether bn normalises by the statistics of its input, as in training."""
    return not is_frozen(bn) and (bn.training or bn._buffers["running_mean"] is None)


KINDS: tuple[type[nn.Module], ...] = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)

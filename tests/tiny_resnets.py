"""ResNets with every kind of layer and few channels, plain and fused, with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from conditioning import well_conditioned
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from fastres import fuse_model
from fastres.models.resnet import FusedBasicBlock, FusedResNet, ResNet

CLASSES = 5


def images(n: int = 6, **kwargs: Any) -> Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(1), **kwargs)


def plain_resnet(
    norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d, classes: int = CLASSES
) -> ResNet:
    """A stem with a max-pool, a block of each shortcut, a classifier."""
    return well_conditioned(_small(ResNet, BasicBlock, norm_layer, classes))


def by_fastres(plain: ResNet) -> ResNet:
    """As if built with ``fused=True``, with the weights, statistics and mode of ``plain``."""
    fused = _small(FusedResNet, FusedBasicBlock, plain._norm_layer, plain.fc.out_features)
    fused = fused.to(next(plain.parameters()).dtype)
    fused.load_state_dict(copy.deepcopy(plain.state_dict()))
    return fused.train(plain.training)


class OtherResNet(ResNet):
    """Somebody else's, which fuse_model knows by its graph alone."""


class OtherBlock(BasicBlock):
    """As OtherResNet."""


def by_tracing(plain: ResNet) -> ResNet:
    """By ``fuse_model``, as a model whose classes it has never seen."""
    other = copy.deepcopy(plain)
    for module in other.modules():
        module.__class__ = {ResNet: OtherResNet, BasicBlock: OtherBlock}.get(
            type(module), type(module)
        )
    return fuse_model(other, inplace=True)


# How a plain model becomes a fused one.
FUSED = {"fused=True": by_fastres, "fuse_model": fuse_model, "fuse_model, traced": by_tracing}


def _small(
    cls: type[ResNet], block: Any, norm_layer: Callable[..., nn.Module], classes: int
) -> ResNet:
    with torch.device("meta"):  # the full size is never in memory
        model = cls(block, [1, 1, 1, 1])
    model.inplanes, model._norm_layer = 8, norm_layer
    model.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    model.bn1 = norm_layer(8)
    model.layer1 = model._make_layer(block, 8, 1)
    model.layer2 = model._make_layer(block, 16, 1, stride=2)
    model.layer3, model.layer4 = nn.Sequential(), nn.Sequential()
    model.fc = nn.Linear(16, classes)
    return model

"""fuse_model: the fused ops in models that others wrote.

A module keeps everything that it holds; only its class changes, to a subclass of its own whose
forward calls the fused ops with the layers that the module owns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torchvision.models import resnet as torchvision_resnet

from ..models.resnet import FusedBasicBlock, FusedBottleneck, FusedResNet, ResNet
from ..nn import PackedWeights
from ..nn.conv_bn import as_conv_bn, fuses
from ..nn.norm import KINDS
from .report import FusedUnit, FuseReport, LeftLayer

# The classes that fastres has a fused form of: each a subclass with the same attributes.
FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    torchvision_resnet.BasicBlock: FusedBasicBlock,
    torchvision_resnet.Bottleneck: FusedBottleneck,
    torchvision_resnet.ResNet: FusedResNet,
    ResNet: FusedResNet,
}


def fuse_model(model: nn.Module, inplace: bool = False) -> Any:
    """Compute a model's Conv2d -> BatchNorm2d -> ReLU units and residual adds by the fused ops.

    Answers, parameters (the same tensors under the same names), state_dict, hooks, `train()` and
    `eval()` stay what they are. Where something is attached to a layer, that layer runs as its own
    modules; so does everything that the report says was left.

    Args:
        model: any module; torchvision's ResNet, ResNeXt, Wide ResNet ...
        inplace: change `model` itself and return it; otherwise a copy is fused and returned.

    Returns:
        The fused model, of the model's type. Its attribute `fastres_report`, a
        :class:`FuseReport`, says what was fused and what was not, and why.

    Raises:
        TypeError: an argument is of another type, or `model` is compiled or in TorchScript
            already.
    """
    _check(model, inplace)
    if not inplace:
        model = copy.deepcopy(model)
    for module in model.modules():
        fused = FUSED_CLASSES.get(type(module))
        if fused is not None:
            module.__class__ = fused
            module._packed = PackedWeights()
        if fused is FusedResNet:
            module.keep_last_stage()
    model.fastres_report = _report(model)
    return model


def _check(model: object, inplace: object) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"fuse_model: model is a {type(model).__name__}, which is TorchScript already; "
            "expected the model that it was made from: fuse first, then script or trace"
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError(
            "fuse_model: model is compiled already; expected the model that was given to "
            "torch.compile: fuse first, then compile"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fuse_model: model is a {type(model).__name__}; expected a torch.nn.Module"
        )
    if not isinstance(inplace, bool):
        raise TypeError(f"fuse_model: inplace is {inplace!r}; expected True or False")


def _report(model: nn.Module) -> FuseReport:
    fused: list[FusedUnit] = []
    found: set[nn.Module] = set()
    for name, module in model.named_modules():
        if type(module) in FUSED_CLASSES.values():
            for unit in _units(module):
                layers = tuple(f"{name}.{layer}".removeprefix(".") for layer in unit)
                found.update(model.get_submodule(layer) for layer in layers)
                fused.append(FusedUnit(layers, "conv + bn"))
    left = [
        LeftLayer(name, "is in no unit that the fused ops compute")
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, *KINDS)) and module not in found
    ]
    return FuseReport(tuple(fused), tuple(left))


def _units(module: Any) -> Iterator[tuple[str, str]]:
    for conv, bn in module.unit_names():
        if fuses(module._modules[conv], module._modules[bn]):
            yield conv, bn
    pair = as_conv_bn(module._modules.get("downsample"))
    if pair is not None and fuses(*pair):
        conv, bn = module.downsample._modules
        yield f"downsample.{conv}", f"downsample.{bn}"

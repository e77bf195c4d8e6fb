"""fuse_model: the fused ops in models that others wrote.

A module keeps everything that it holds; only its class changes, to a subclass of its own whose
forward calls the fused ops with the layers that the module owns.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import resnet as torchvision_resnet

from ..models.resnet import FusedBasicBlock, FusedBottleneck, FusedResNet, ResNet
from ..nn import FusedUnits
from ..nn.conv_bn import is_untouched
from ..nn.norm import FROZEN, know_timm
from .build import Graphs, become_region
from .patterns import layers_of
from .region import Region
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
    `eval()` stay what they are: modules that call units get a class of their own, a subclass of
    what they had. Where something is attached to a layer or its container, or changed, after this,
    these run as their own modules; so does everything that the report says was left. Results of
    fused units are channels_last.

    Args:
        model: any module: torchvision's, timm's and Hugging Face's ResNets and their like, the
            backbones of detection models, your own.
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
    know_timm()
    graphs = Graphs()
    names = {module: name for name, module in model.named_modules()}
    for module in reversed(names):  # children before their parents
        _fuse(module, graphs)
    model.fastres_report = _report(model, graphs, names)
    return model


def _fuse(module: Any, graphs: Graphs) -> None:
    """Give a module another class, if it calls units."""
    fused = FUSED_CLASSES.get(type(module))
    if fused is None:
        if not isinstance(module, Region | FusedUnits):
            become_region(module, graphs)
    elif graphs.units(module):
        module.__class__ = fused
        module.start_packing()
        if fused is FusedResNet:
            module.keep_last_stage()


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


def _report(model: nn.Module, graphs: Graphs, names: dict[nn.Module, str]) -> FuseReport:
    fused: list[FusedUnit] = []
    found: set[str] = set()  # a ReLU may be that of several units
    for module, prefix in names.items():
        for unit in graphs.units(module):
            layers = tuple(f"{prefix}.{name}".removeprefix(".") for name in layers_of(unit))
            if not layers or layers[0] not in found:  # none: an add and a ReLU that is a function
                fused.append(FusedUnit(layers, unit.kind, _note(model, layers)))
                found.update(layers[: 2 if unit.conv else 0])
    left = tuple(
        LeftLayer(name, graphs.why_left(model, name))
        for module, name in names.items()
        if (isinstance(module, nn.Conv2d | _BatchNorm) or type(module) in FROZEN)
        and name not in found
    )
    return FuseReport(tuple(fused), left)


def _note(model: nn.Module, layers: tuple[str, ...]) -> str:
    modules: list[Any] = [model.get_submodule(name) for name in layers]
    for name, module in zip(layers, modules, strict=True):
        if not is_untouched(module, type(module)):
            return f"as its own modules while something is attached to {name}"
    if any(isinstance(module, nn.Conv2d) and module.bias is not None for module in modules):
        return "in training as its own modules: the convolution has a bias"
    return ""

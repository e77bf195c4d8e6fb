"""The ResNet family: torchvision's models, with a choice of stem and shortcut.

Parameter names, initialisation order and state_dict are torchvision's, both ways.
He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet
from torchvision.models._api import WeightsEnum
from torchvision.models.resnet import BasicBlock, Bottleneck

from .. import ops
from ..nn.chain import Chain, chains
from ..nn.conv_bn import (
    conv_bn_add_relu,
    conv_bn_relu,
    finish,
    is_untouched,
    is_watched,
    kept_anyway,
    project,
)
from ..nn.head import head, is_head
from ..nn.max_pool import max_pool, pool_geometry, pools_later
from ..nn.recording import Recordings
from ..nn.units import FusedUnits, waits
from ..ops.reference import channels_last

STEMS = ("imagenet", "cifar")
SHORTCUTS = ("projection", "zero_pad")


class ZeroPadShortcut(nn.Module):
    """Shortcut without parameters: take every ``stride``-th pixel, pad new channels with zeros.

    Option A of https://arxiv.org/abs/1512.03385, section 4.1.
    ``(N, in_channels, H, W)`` -> ``(N, out_channels, ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, [0, 0, 0, 0, 0, self.new_channels])

    def extra_repr(self) -> str:
        return f"new_channels={self.new_channels}, stride={self.stride}"


class ResNet(torchvision_resnet.ResNet):
    """torchvision's ResNet with fastres' stems and shortcuts.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the last layer.
        zero_init_residual: start the last BatchNorm of each block at zero.
        groups, width_per_group: of a Bottleneck's 3x3 convolution (ResNeXt, wide ResNet).
        replace_stride_with_dilation: for stages 2 to 4, dilate instead of striding.
        norm_layer: what stands in the place of ``nn.BatchNorm2d``.
        stem: ``"imagenet"`` (7x7 stride 2, max-pool) or ``"cifar"`` (3x3 stride 1, no pool).
        shortcut: where the shape changes: ``"projection"`` (1x1 convolution and BatchNorm)
            or ``"zero_pad"`` (no parameters).

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: list[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        stem: str = "imagenet",
        shortcut: str = "projection",
    ) -> None:
        _check_choice("stem", stem, STEMS)
        _check_choice("shortcut", shortcut, SHORTCUTS)
        _check_positive("num_classes", num_classes)
        _check_positive("groups", groups)
        _check_positive("width_per_group", width_per_group)
        if issubclass(block, BasicBlock):
            for name, value, only in (
                ("groups", groups, 1),
                ("width_per_group", width_per_group, 64),
            ):
                if value != only:
                    raise ValueError(f"resnet: {name} is {value}; expected {only} with BasicBlock")
        super().__init__(
            block,
            layers,
            num_classes=num_classes,
            zero_init_residual=zero_init_residual,
            groups=groups,
            width_per_group=width_per_group,
            replace_stride_with_dilation=replace_stride_with_dilation,
            norm_layer=norm_layer,
        )
        # Replaced afterwards, so that all other parameters are torchvision's for the same seed.
        if stem == "cifar":
            self.conv1 = torchvision_resnet.conv3x3(3, 64)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.maxpool = nn.Identity()
        if shortcut == "zero_pad":
            for b in self.blocks():
                if b.downsample is not None:
                    projection: Any = b.downsample[0]
                    b.downsample = ZeroPadShortcut(
                        projection.in_channels, projection.out_channels, projection.stride[0]
                    )

    def blocks(self) -> Iterator[Any]:
        """The residual blocks, from the first stage to the last."""
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            yield from stage


class FusedBasicBlock(FusedUnits, BasicBlock):
    """torchvision's BasicBlock, computed in three passes by the fused ops."""

    recompute = 2

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            if self._folds and not self.training:
                return self._folded2(self._folded1(x), self._folded_shortcut(x))
            else:
                out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
                return self.relu(out + self._shortcut(x))
        else:
            out = conv_bn_relu(self.conv1, self.bn1, self.relu, x, self._packed)
            shortcut = project(self.downsample, x, self._packed)
            recompute = self.recompute if kept_anyway(shortcut, x) else 0
            return conv_bn_add_relu(
                self.conv2, self.bn2, self.relu, out, shortcut, self._packed, recompute
            )


class FusedBottleneck(FusedUnits, Bottleneck):
    """torchvision's Bottleneck, computed in four passes by the fused ops."""

    recompute = 3

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            if self._folds and not self.training:
                out = self._folded2(self._folded1(x))
                return self._folded3(out, self._folded_shortcut(x))
            else:
                out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
                return self.relu(self.bn3(self.conv3(out)) + self._shortcut(x))
        else:
            mid = conv_bn_relu(self.conv1, self.bn1, self.relu, x, self._packed)
            mid = conv_bn_relu(self.conv2, self.bn2, self.relu, mid, self._packed)
            shortcut = project(self.downsample, x, self._packed)
            recompute = self.recompute if kept_anyway(shortcut, x) else 0
            return conv_bn_add_relu(
                self.conv3, self.bn3, self.relu, mid, shortcut, self._packed, recompute
            )


class FusedResNet(FusedUnits, ResNet):
    """ResNet of the fused blocks. Inputs in another layout than channels_last are converted."""

    recompute = 1

    if TYPE_CHECKING:
        maxpool: Any
        avgpool: Any
        layer1: Any
        layer2: Any
        layer3: Any
        layer4: Any
        fc: Any

    __constants__ = (*FusedUnits.__constants__, "_pool_sizes", "_pools")
    __jit_unused_properties__ = (*FusedUnits.__jit_unused_properties__, "_pool_sizes", "_pools")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep_last_stage()

    def keep_last_stage(self) -> None:
        """Keep the last stage's outputs, which the backward wants before it has freed memory."""
        if isinstance(self.layer4, nn.Sequential):
            for block in self.layer4:
                block.recompute = 0

    def _forward_impl(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            x = x.contiguous(memory_format=torch.channels_last)
            return self.fc(torch.flatten(self.avgpool(self._stages(self._stem(x))), 1))
        else:
            x = channels_last(x)
            if chains(x) and not is_watched():
                y = self._recordings.compute(self, x)
                if y is None:
                    return self._record(x)
                return self._head(y) if y.dim() == 4 else y
            else:
                return self._head(self._stages(self._stem(x)))

    def _head(self, x: Tensor) -> Tensor:
        if self.training:
            return self.fc(torch.flatten(self.avgpool(x), 1))
        else:
            return head(self.avgpool, self.fc, x)

    def _record(self, x: Tensor) -> Tensor:
        """The result of an x whose units may wait: those that can are computed in one call."""
        stem: Any = self._stem
        stages: Any = self._stages
        if not self._chains():
            return self._head(stages(stem(x)))
        if not self._stem_chains():
            x = stem(x)
            return self._head(stages(Chain(x).start()).compute() if chains(x) else stages(x))
        chain = Chain(x)
        parts = (self.conv1, self.bn1, self.relu, self.maxpool)
        parts += (self.layer1, self.layer2, self.layer3, self.layer4)
        ends = not self.training and is_head(self.avgpool, self.fc, x)
        if ends:
            parts += (self.avgpool, self.fc)
        y = stages(stem(chain.start())).compute(self.fc if ends else None)
        called = (module for part in parts for module in part.modules())
        self._recordings.keep(self, called, x, chain)
        return y if ends else self._head(y)

    def start_packing(self) -> None:
        super().start_packing()
        self._recordings = Recordings()

    def _forget(self) -> None:
        self._recordings.clear()
        super()._forget()

    def _stages(self, x: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def _chains(self) -> bool:
        """Whether all that the blocks do is fused units with their running statistics."""
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        return all(is_untouched(stage, nn.Sequential) for stage in stages) and all(
            type(block) in _FUSED_BLOCKS.values()
            and is_untouched(block, type(block))
            and block.chains()
            for block in self.blocks()
        )

    def _stem_chains(self) -> bool:
        """Whether all that the stem does is a fused unit, and a pool that can wait with it."""
        return (
            is_untouched(self.relu, nn.ReLU)
            and waits(self.conv1, self.bn1)
            and pools_later(self.maxpool)
        )

    def _stem(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            if self._folds and not self.training:
                return self._folded_pool(self._folded1(x))
            else:
                return self.maxpool(self.relu(self.bn1(self.conv1(x))))
        else:
            out = conv_bn_relu(self.conv1, self.bn1, self.relu, x, self._packed)
            if isinstance(self.maxpool, nn.Identity):  # a pool keeps its input
                out = finish(out, relu=True, recompute=self.recompute)
            return max_pool(self.maxpool, out)

    def _folded_pool(self, x: Tensor) -> Tensor:
        if self._pools and x.device.type == "cpu":
            kernel_size, stride, padding = self._pool_sizes
            return ops.max_pool2d(x, kernel_size, stride, padding)
        else:
            return self.maxpool(x)

    @property
    def _pools(self) -> bool:
        """Whether the op max_pool2d can take maxpool's place on the CPU."""
        return pool_geometry(self.maxpool) is not None

    @property
    def _pool_sizes(self) -> tuple[list[int], ...]:
        """maxpool's kernel size, stride and padding, where it can."""
        return pool_geometry(self.maxpool) or ()


_FUSED_BLOCKS = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck}


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = " or ".join(repr(c) for c in choices)
        raise ValueError(f"resnet: {name} is {value!r}; expected {expected}")


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"resnet: {name} is {value!r}; expected a positive integer")


def _resnet(
    block: type[BasicBlock] | type[Bottleneck],
    layers: list[int],
    weights: WeightsEnum | None,
    progress: bool,
    fused: bool,
    **kwargs: Any,
) -> ResNet:
    if not isinstance(fused, bool):
        raise TypeError(f"resnet: fused is {fused!r}; expected True or False")
    cls: type[ResNet] = ResNet
    if fused:
        cls, block = FusedResNet, _FUSED_BLOCKS[block]
    if weights is None:
        return cls(block, layers, **kwargs)
    categories = len(weights.meta["categories"])
    # The published weights fit one architecture only: say so by name, not by a size mismatch.
    for name, fits in (("num_classes", categories), ("stem", STEMS[0]), ("shortcut", SHORTCUTS[0])):
        if kwargs.setdefault(name, fits) != fits:
            raise ValueError(
                f"resnet: {name} is {kwargs[name]!r}; expected {fits!r} with weights={weights}"
            )
    model = cls(block, layers, **kwargs)
    model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    return model


_DOC = """ResNet-{depth}, https://arxiv.org/abs/1512.03385; torchvision's, parameter by parameter.

    Args:
        weights: a ``torchvision.models.ResNet{depth}_Weights`` or its name, such as
            ``"IMAGENET1K_V1"``; torchvision downloads them. None: random initialisation.
        progress: show a progress bar for the download.
        fused: compute with fastres' fused ops: faster, in less memory, the same answers.
        **kwargs: keyword arguments of :class:`ResNet`: ``stem``, ``shortcut``, ``num_classes`` ...

    Returns:
        A model from images ``(N, 3, H, W)`` to logits ``(N, num_classes)``.
    """


def resnet18(
    *,
    weights: torchvision_resnet.ResNet18_Weights | str | None = None,
    progress: bool = True,
    fused: bool = False,
    **kwargs: Any,
) -> ResNet:
    weights = torchvision_resnet.ResNet18_Weights.verify(weights)
    return _resnet(BasicBlock, [2, 2, 2, 2], weights, progress, fused, **kwargs)


def resnet34(
    *,
    weights: torchvision_resnet.ResNet34_Weights | str | None = None,
    progress: bool = True,
    fused: bool = False,
    **kwargs: Any,
) -> ResNet:
    weights = torchvision_resnet.ResNet34_Weights.verify(weights)
    return _resnet(BasicBlock, [3, 4, 6, 3], weights, progress, fused, **kwargs)


def resnet50(
    *,
    weights: torchvision_resnet.ResNet50_Weights | str | None = None,
    progress: bool = True,
    fused: bool = False,
    **kwargs: Any,
) -> ResNet:
    weights = torchvision_resnet.ResNet50_Weights.verify(weights)
    return _resnet(Bottleneck, [3, 4, 6, 3], weights, progress, fused, **kwargs)


def resnet101(
    *,
    weights: torchvision_resnet.ResNet101_Weights | str | None = None,
    progress: bool = True,
    fused: bool = False,
    **kwargs: Any,
) -> ResNet:
    weights = torchvision_resnet.ResNet101_Weights.verify(weights)
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, progress, fused, **kwargs)


def resnet152(
    *,
    weights: torchvision_resnet.ResNet152_Weights | str | None = None,
    progress: bool = True,
    fused: bool = False,
    **kwargs: Any,
) -> ResNet:
    weights = torchvision_resnet.ResNet152_Weights.verify(weights)
    return _resnet(Bottleneck, [3, 8, 36, 3], weights, progress, fused, **kwargs)


for _depth, _build in {
    18: resnet18,
    34: resnet34,
    50: resnet50,
    101: resnet101,
    152: resnet152,
}.items():
    _build.__doc__ = _DOC.format(depth=_depth)

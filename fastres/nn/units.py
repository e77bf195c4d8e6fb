"""The base of modules that own fused units: their packed weights, and the units in TorchScript."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import ops
from .conv_bn import as_conv_bn, fuses, is_untouched
from .norm import uses_batch_statistics
from .packed import PackedWeights


def folded(
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
    relu: bool,
    residual: Tensor | None,
) -> Tensor:
    """``[relu](bn(conv(x)) [+ residual])`` in eval mode; freezing the graph folds the packing."""
    assert running_mean is not None  # which TorchScript can't know
    assert running_var is not None
    packed = ops.pack_conv_weight(weight, stride, padding, dilation, groups)
    return ops.conv_bn_relu(
        x, weight, bias, running_mean, running_var, bn_weight, bn_bias, eps, residual,
        stride, padding, dilation, groups, relu, packed,
    )  # fmt: skip


class PacksWeights(nn.Module):
    """Base of a module that keeps packed weights, dropped whenever they may have changed unseen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start_packing()

    def start_packing(self) -> None:
        """Have nothing packed yet: of a new module, or one that is given this class."""
        self._packed = PackedWeights()

    def _forget(self) -> None:
        """Drop what was made of weights that may be others now."""
        self._packed.clear()

    def train(self, mode: bool = True) -> PacksWeights:
        self._forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> PacksWeights:
        self._forget()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)


class FusedUnits(PacksWeights):
    """Base of a module with the units ``conv1, bn1, conv2, ...``, a ``relu``, a ``downsample``.

    The methods ``_folded*`` are
    for TorchScript, which can't pass modules to a function; it reads the properties once, as
    constants, and compiles no branch that they rule out.

    ``recompute``: of how many such modules in a row the output is computed again in the backward
    of a training step and not kept; 0 takes the memory and saves a pass over it.
    """

    recompute = 0

    if TYPE_CHECKING:  # at run time TorchScript would take it for the attributes' types
        conv1: Any
        conv2: Any
        conv3: Any
        bn1: Any
        bn2: Any
        bn3: Any
        relu: Any
        downsample: Any

    __constants__ = ("_folds", "_projection_folds")
    __jit_unused_properties__ = ("_folds", "_projection_folds")

    def unit_names(self) -> list[tuple[str, str]]:
        """The names of the module's own convolutions, each with its BatchNorm's."""
        names = [name for name in self._modules if name.startswith("conv")]
        return [(name, name.replace("conv", "bn")) for name in names]

    @property
    def _folds(self) -> bool:
        """Whether every conv1, bn1, conv2, ... of the module can be folded."""
        return is_untouched(self.relu, nn.ReLU) and all(
            _pair_folds(self._modules[conv], self._modules[bn]) for conv, bn in self.unit_names()
        )

    @property
    def _projection_folds(self) -> bool:
        """Whether the module has a downsample that can be folded."""
        pair = as_conv_bn(self._modules.get("downsample"))
        return pair is not None and _pair_folds(*pair)

    def chains(self) -> bool:
        """Whether the module's units can wait for those after them: see ``chain.Deferred``."""
        pairs = [(self._modules[conv], self._modules[bn]) for conv, bn in self.unit_names()]
        if self.downsample is not None:
            pair = as_conv_bn(self.downsample)
            if pair is None:
                return False
            pairs.append(pair)
        return is_untouched(self.relu, nn.ReLU) and all(waits(*pair) for pair in pairs)

    def _folded1(self, x: Tensor) -> Tensor:
        return folded(
            x, self.conv1.weight, self.conv1.bias, self.bn1.running_mean, self.bn1.running_var,
            self.bn1.weight, self.bn1.bias, self.bn1.eps, self.conv1.stride, self.conv1.padding,
            self.conv1.dilation, self.conv1.groups, True, None,
        )  # fmt: skip

    def _folded2(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        return folded(
            x, self.conv2.weight, self.conv2.bias, self.bn2.running_mean, self.bn2.running_var,
            self.bn2.weight, self.bn2.bias, self.bn2.eps, self.conv2.stride, self.conv2.padding,
            self.conv2.dilation, self.conv2.groups, True, shortcut,
        )  # fmt: skip

    def _folded3(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return folded(
            x, self.conv3.weight, self.conv3.bias, self.bn3.running_mean, self.bn3.running_var,
            self.bn3.weight, self.bn3.bias, self.bn3.eps, self.conv3.stride, self.conv3.padding,
            self.conv3.dilation, self.conv3.groups, True, shortcut,
        )  # fmt: skip

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is None:
            return x
        else:
            return self.downsample(x)

    def _folded_shortcut(self, x: Tensor) -> Tensor:
        if self._projection_folds:
            return self._folded_projection(x)
        else:
            return self._shortcut(x)

    def _folded_projection(self, x: Tensor) -> Tensor:
        return folded(
            x, self.downsample[0].weight, self.downsample[0].bias,
            self.downsample[1].running_mean, self.downsample[1].running_var,
            self.downsample[1].weight, self.downsample[1].bias, self.downsample[1].eps,
            self.downsample[0].stride, self.downsample[0].padding,
            self.downsample[0].dilation, self.downsample[0].groups, False, None,
        )  # fmt: skip


def waits(conv: Any, bn: Any) -> bool:
    """Whether a unit can wait for those after it: see ``chain.Deferred``."""
    return (
        fuses(conv, bn)
        and not uses_batch_statistics(bn)
        and type(conv._parameters["weight"]) is nn.Parameter
    )


def _pair_folds(conv: Any, bn: Any) -> bool:
    return fuses(conv, bn) and bn._buffers["running_mean"] is not None

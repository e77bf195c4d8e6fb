"""A module's forward with its units computed by the fused ops, as a class of its own.

A region is a module whose forward calls units, by itself or through containers that it owns. Its
class is made from that of the module: the same name and attributes, another forward. The graph of
which that was made must still hold in each call; where it does not (a hook on a container, another
module in its place, an attribute with another value), the forward of before runs.
"""

from __future__ import annotations

import functools
import itertools
import linecache
import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..nn.conv_bn import fuses, is_untouched, shows_modules
from ..nn.norm import has_relu, uses_batch_statistics
from ..nn.units import PacksWeights
from .reads import Read, picture, shows, submodule, value_of


class UnitNames(NamedTuple):
    """The layers of a unit that has a convolution."""

    conv: str
    bn: str
    relu: str | None  # None: none, a function, or bn's own
    own_relu: bool


@dataclass(frozen=True)
class Code:
    """What a region's class is made of.

    Attributes:
        argument: the name of forward's argument.
        fused, folded: sources of the forward by the fused ops, and of TorchScript's in eval mode
            ("" if there is none).
        units: those with a convolution.
        opened: the containers whose forward is part of this one's.
        reads: the attributes that these forwards read.
        skipped: modules that do nothing.
        waits: whether all that it does is units, so that they may wait: see `chain.Deferred`.
        names: the globals of both sources.
    """

    argument: str
    fused: str
    folded: str
    units: tuple[UnitNames, ...]
    opened: tuple[str, ...]
    reads: tuple[Read, ...]
    skipped: tuple[str, ...]
    waits: bool
    names: dict[str, Any] = field(compare=False, hash=False)


class _Unpickled:
    """What copies share and pickles leave out."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()


class Held(_Unpickled):
    """What a region's graph was made from, to see whether it still holds."""

    def __init__(self, region: nn.Module, code: Code) -> None:
        containers = [(path, region.get_submodule(path)) for path in ("", *code.opened)]
        self.parts = tuple((path, type(m), _children(m)) for path, m in containers)
        self.read = tuple((read, picture(value_of(region, read))) for read in code.reads)
        self.skipped = code.skipped

    def holds(self, region: nn.Module) -> bool:
        for path, kind, children in self.parts:
            container = submodule(region, path)
            if path and not is_untouched(container, kind):
                return False
            if _children(container) != children:
                return False
        for read, before in self.read:
            if not shows(value_of(region, read), before):
                return False
        return all(is_untouched(submodule(region, path), nn.Identity) for path in self.skipped)


def _children(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, child in module._modules.items() if child is not None)


class Region(PacksWeights):
    """Base of the classes that are made for regions; the module's own class comes after it."""

    if TYPE_CHECKING:  # at run time TorchScript would take it for the attributes' types
        _code: Code
        _base: type[nn.Module]

    _held = None  # of an instance that was made by its class, not by fuse_model

    @property
    def _folds(self) -> bool:
        """Whether TorchScript can take the folded forward."""
        return (
            self._code.folded != ""
            and self._holds()
            and all(
                self._fuses(unit) and submodule(self, unit.bn)._buffers["running_mean"] is not None
                for unit in self._code.units
            )
        )

    def chains(self) -> bool:
        """Whether the module's units can wait for those after them: see ``chain.Deferred``."""
        return (
            self._code.waits
            and self._holds()
            and all(
                self._fuses(unit)
                and not uses_batch_statistics(submodule(self, unit.bn))
                and type(submodule(self, unit.conv)._parameters["weight"]) is nn.Parameter
                for unit in self._code.units
            )
        )

    def _holds(self) -> bool:
        held: Any = self._held
        return held is not None and held.holds(self)

    def _takes(self, x: Any) -> bool:
        """Whether the forward by the fused ops is right for x."""
        return not shows_modules(x) and self._holds()

    def _fuses(self, unit: UnitNames) -> bool:
        conv, bn = submodule(self, unit.conv), submodule(self, unit.bn)
        relu = unit.relu is None or is_untouched(submodule(self, unit.relu), nn.ReLU)
        return relu and fuses(conv, bn) and has_relu(bn) == unit.own_relu

    def _get_name(self) -> str:
        return "Fused" + super()._get_name()  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        rest: Any = super().__reduce_ex__(protocol)[2:]
        return (_revive, (self._base, _Kept(type(self))), *rest)


class _Kept(_Unpickled):
    """A region's class: kept by a copy, made anew when a pickle is loaded."""

    def __init__(self, cls: type[Region]) -> None:
        self.cls = cls


def _revive(base: type[nn.Module], kept: _Kept | None) -> nn.Module:
    cls = _loaded(base) if kept is None else kept.cls
    return cls.__new__(cls)


def _loaded(base: type[nn.Module]) -> type[nn.Module]:
    """A class that becomes a region, where the module's code still allows it, with its state."""

    class Loaded(base):  # type: ignore[misc, valid-type]
        def __setstate__(self, state: dict[str, Any]) -> None:
            from .build import Graphs, become_region

            super().__setstate__(state)
            self.__class__ = base
            become_region(self, Graphs())

    return Loaded


_COUNT = itertools.count()
_CLASSES: dict[tuple[type[nn.Module], Code], type[Region]] = {}

_FORWARD = """
def forward(self, {x}):
    if torch.jit.is_scripting():
        if self._folds and not self.training:
            return self._folded({x})
        else:
            return self._plain({x})
    elif self._takes({x}):
        return self._fused({x})
    else:
        return self._plain({x})
"""


def region_class(base: type[nn.Module], code: Code) -> type[Region]:
    """The class of a region of modules of class `base`.

    Raises:
        TypeError: there can be no such class.
    """
    key = (base, code)
    if key not in _CLASSES:
        members = {
            "forward": _function(_FORWARD.format(x=code.argument), {"torch": torch}),
            "_fused": _function(code.fused, code.names),
            "_folded": _function(code.folded or code.fused, code.names),
            "_plain": _renamed(base.forward, "_plain"),
            "_code": code,
            "_base": base,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            # TorchScript reads these from the first class that has them.
            "__annotations__": dict(getattr(base, "__annotations__", {})),
            "__constants__": (*getattr(base, "__constants__", ()), "_folds"),
            "__jit_unused_properties__": (
                *getattr(base, "__jit_unused_properties__", ()),
                "_folds",
            ),
        }
        _CLASSES[key] = types.new_class(
            base.__name__, (Region, base), {}, lambda body: body.update(members)
        )
    return _CLASSES[key]


def _function(source: str, names: dict[str, Any]) -> Any:
    """The function of a source, which tools that read sources find again."""
    name = source.split("def ", 1)[1].split("(", 1)[0]
    file = f"<fastres.fuse {next(_COUNT)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = dict(names)
    exec(compile(source, file, "exec"), scope)
    return scope[name]


def _renamed(function: Any, name: str) -> Any:
    """The same function under the name by which TorchScript is to compile it."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    functools.update_wrapper(copy, function, ("__module__", "__doc__", "__annotations__"))
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def become(module: Any, code: Code) -> None:
    """Make a module the region that `code` describes."""
    module.__class__ = region_class(type(module), code)
    module.start_packing()
    module._held = Held(module, code)

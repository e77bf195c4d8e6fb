"""What a forward reads of its module's attributes, so that a later change of one can be seen."""

from __future__ import annotations

import functools
import numbers
import types
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# The last two are what the forward of a region reads before it shows its module's own.
_OF_EVERY_MODULE = frozenset([*dir(nn.Module()), "_takes", "_plain"])
_MISSING = "there is no such attribute"
# What is compared as it is.
_PLAIN = (
    numbers.Number, str, bytes, type(None), type, Enum, slice, range,
    torch.dtype, torch.device, torch.memory_format,
    types.FunctionType, types.BuiltinFunctionType,
)  # fmt: skip
_MOST = 100  # values in a value, and such values in an attribute: what each call has time for


class Read(NamedTuple):
    """An attribute that a forward reads: of the module of this name in its own."""

    path: str
    name: str


class UnseenError(Exception):
    """A value of which not every change could be seen."""


class Reads:
    """The attributes that are read of a module and of those in it, but for modules."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._names = {
            part: name
            for name, part in module.named_modules()
            if not isinstance(part, torch.jit.ScriptModule)  # whose forward cannot change
        }
        self._read: dict[Read, None] = {}

    def add(self, module: Any, name: str) -> None:
        if name not in _OF_EVERY_MODULE and not name.startswith("__") and module in self._names:
            self._read[Read(self._names[module], name)] = None

    def all(self) -> tuple[Read, ...]:
        values = ((read, value_of(self._module, read)) for read in self._read)
        return tuple(read for read, value in values if not isinstance(value, nn.Module))


@contextmanager
def reads_of(module: nn.Module) -> Iterator[Reads]:
    """Collect what is read of `module` meanwhile."""
    reads = Reads(module)

    def recorded(self: nn.Module, name: str) -> Any:
        reads.add(self, name)
        return super(nn.Module, self).__getattribute__(name)

    nn.Module.__getattribute__ = recorded
    try:
        yield reads
    finally:
        del nn.Module.__getattribute__


def value_of(module: nn.Module, read: Read) -> Any:
    """What `read` gives now."""
    return getattr(submodule(module, read.path), read.name, _MISSING)


def submodule(module: Any, path: str) -> Any:
    """The module of this name, or None."""
    for name in path.split(".") if path else ():
        module = module._modules.get(name)
        if module is None:
            return None
    return module


def shows(value: Any, before: tuple[Any, ...]) -> bool:
    """Whether `before` is the picture of `value`."""
    return value is before[1] or picture(value) == before


def picture(value: Any) -> tuple[Any, ...]:
    """What is equal as long as nothing in `value` is changed.

    Tensors and modules are only told from what is none: graphs hold them by name.

    Raises:
        UnseenError: there is no such picture.
    """
    return _picture(value, iter(range(_MOST)))


def _picture(value: Any, budget: Iterator[int]) -> tuple[Any, ...]:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        return Tensor, Tensor
    if isinstance(value, nn.Module):
        return nn.Module, nn.Module
    if next(budget, None) is None:
        raise UnseenError
    if isinstance(value, types.MethodType):
        parts: Any = (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
    elif isinstance(value, dict):
        parts = [part for item in value.items() for part in item]
    elif isinstance(value, list | tuple):
        parts = value
    elif isinstance(value, set | frozenset):
        return type(value), frozenset(value)
    elif hasattr(value, "__dict__"):
        parts = (vars(value),)
    else:
        raise UnseenError
    if len(parts) > 2 * _MOST:  # a dictionary's keys are parts, too
        raise UnseenError
    return type(value), tuple([_picture(part, budget) for part in parts])

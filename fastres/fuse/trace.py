"""What a module's own forward does, as a graph in which each child is a call.

Only what holds for every call may come out of this: a forward that does one thing in training and
another in evaluation, draws random numbers, or changes the module, has no graph.
"""

from __future__ import annotations

import inspect
import operator
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer
from torch.utils._python_dispatch import TorchDispatchMode

from .reads import Read, UnseenError, picture, reads_of, value_of


class UntraceableError(Exception):
    """A module's forward has no graph; the message says why."""


class _Proxy(Proxy):
    """A proxy by which `x += y` is seen to change x."""

    def __iadd__(self, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


_DEVICES = ("cpu", "cuda")
# What a part of a forward can switch for itself, which a graph does not show.
_SWITCHES: dict[str, Callable[[], object]] = {
    "switches gradients for a part of it": lambda: (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    ),
    "switches autocast for a part of it": lambda: [
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES
    ],
    "switches what is kept for the backward for a part of it": lambda: (
        torch._C._autograd._top_saved_tensors_default_hooks(True)
    ),
}


class _OwnForward(Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.before = [state() for state in _SWITCHES.values()]
        self.switched: str | None = None  # what was found, raised once all contexts are left

    def proxy(self, node: Node) -> Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        for (reason, state), before in zip(_SWITCHES.items(), self.before, strict=True):
            if state() != before:
                self.switched = self.switched or reason
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:
            return self.create_proxy("call_function", OrderedDict, (list(a.items()),), {}).node
        if isinstance(a, dict) and type(a) is not dict:
            raise UntraceableError(f"makes a {type(a).__name__}")
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise UntraceableError("makes a tensor that may be another one in the next call")
        return super().create_arg(a)


class _Computed(TorchDispatchMode):
    """Whether anything was computed of real tensors, which may be others in the next call."""

    anything = False

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.anything = True
        return op(*args, **(kwargs or {}))


def own_graph(module: nn.Module) -> tuple[Graph, tuple[Read, ...]]:
    """The graph of `module.forward`, of one argument, and the attributes that it was made from.

    Raises:
        UntraceableError: it has none.
    """
    check_signature(module)
    before, state = _held(module), random.getstate()
    seed = torch.get_rng_state()
    graphs = []
    computed = _Computed()  # type: ignore[no-untyped-call]
    try:
        with reads_of(module) as reads, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whose cause is that there are no tensors
            for mode in (True, False):
                # Whatever is switched, on or off, is switched to something else in one of the two.
                with (
                    torch.set_grad_enabled(mode),
                    _autocast(mode),
                    _training(module, mode),
                    computed,
                ):
                    tracer = _OwnForward()
                    graphs.append(tracer.trace(module))
                if tracer.switched:
                    raise UntraceableError(tracer.switched)
    except UntraceableError:
        raise
    except Exception as problem:  # whatever somebody's code raises when it meets a Proxy
        first = (str(problem).splitlines() or [""])[0]
        raise UntraceableError(f"can't be traced: {type(problem).__name__}: {first}") from None
    finally:
        changed = _restore(module, before)
    if changed:
        raise UntraceableError(f"sets the attribute {changed!r}")
    if random.getstate() != state or not torch.equal(torch.get_rng_state(), seed):
        random.setstate(state)
        torch.set_rng_state(seed)
        raise UntraceableError("draws random numbers")
    if computed.anything:
        raise UntraceableError("computes with a tensor that may be another one in the next call")
    if _source(graphs[0]) != _source(graphs[1]):
        raise UntraceableError("does different things in training and in evaluation")
    for read in reads.all():
        value = value_of(module, read)
        try:
            picture(value)
        except UnseenError:
            kind = type(value).__name__
            raise UntraceableError(
                f"reads the attribute {read.name!r}, a {kind}, of which not every change is seen"
            ) from None
    return graphs[1], reads.all()


def check_signature(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise UntraceableError("is TorchScript already")
    if isinstance(module, GraphModule):
        raise UntraceableError("is a torch.fx.GraphModule")
    if isinstance(module, torch._dynamo.OptimizedModule):
        raise UntraceableError("is compiled already")
    if not has_forward(module):
        raise UntraceableError("does not exist")
    if "forward" in module.__dict__:
        raise UntraceableError("was given another forward")
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(parameters) != 1 or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise UntraceableError("takes more than one argument")
    if parameters[0].annotation not in (inspect.Parameter.empty, Tensor, "Tensor", "torch.Tensor"):
        raise UntraceableError("takes something else than a tensor")
    if parameters[0].default is not inspect.Parameter.empty:
        raise UntraceableError("can be called without an argument")


def has_forward(module: nn.Module) -> bool:
    """Whether the module can be called."""
    return type(module).forward is not nn.Module.forward


def argument_name(module: nn.Module) -> str:
    """What the only argument of `module.forward` is called."""
    return list(inspect.signature(type(module).forward).parameters)[1]


def result(graph: Graph) -> Any:
    """What `graph` returns: a node, or a structure of nodes."""
    return next(node for node in graph.nodes if node.op == "output").args[0]


def _source(graph: Graph) -> str:
    return graph.python_code("self").src


@contextmanager
def _training(module: nn.Module, mode: bool) -> Iterator[None]:
    before = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in before:
            part.training = mode
        yield
    finally:
        for part, training in before:
            part.training = training


@contextmanager
def _autocast(mode: bool) -> Iterator[None]:
    before = {device: torch.is_autocast_enabled(device) for device in _DEVICES}
    try:
        for device in _DEVICES:
            torch.set_autocast_enabled(device, mode)
        yield
    finally:
        for device, enabled in before.items():
            torch.set_autocast_enabled(device, enabled)


def _held(module: nn.Module) -> dict[str, Any]:
    """The module's attributes, containers copied, so that a change can be seen and undone."""
    return {
        name: (value, type(value)(value) if type(value) in (list, dict, set) else value)
        for name, value in module.__dict__.items()
    }


def _restore(module: nn.Module, before: dict[str, Any]) -> str | None:
    """Undo what was done to the module's attributes; returns the name of one that was changed."""
    changed = None
    for name in set(module.__dict__) | set(before):
        value, contents = before.get(name, (None, None))
        now = module.__dict__.get(name)
        if name not in before:
            del module.__dict__[name]
        elif now is value and (value is contents or _same(value, contents)):
            continue
        else:
            module.__dict__[name] = value if value is contents else contents
        changed = name
    return changed


def _same(value: Any, contents: Any) -> bool:
    if len(value) != len(contents) or isinstance(value, set):
        return value == contents
    if isinstance(value, dict):
        return all(k in contents and contents[k] is v for k, v in value.items())
    return all(a is b for a, b in zip(value, contents, strict=True))


def child(module: nn.Module, node: Node) -> nn.Module:
    """The module that `node`, a `call_module` of a graph of `module`, calls."""
    assert isinstance(node.target, str)
    return module.get_submodule(node.target)

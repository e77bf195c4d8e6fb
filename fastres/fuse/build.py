"""From a module's graph to its region: which containers to open, and the code of its forward."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn import FusedUnits, finish, max_pool
from ..nn.conv_bn import conv_bn, conv_bn_relu
from ..nn.norm import FROZEN, has_relu
from ..nn.units import folded
from .calls import add_relu, end_chain, folded_add_relu, plain_relu, start_chain, unit_add_relu
from .patterns import Unit, find_units, module_of, why_no_unit
from .reads import Read
from .region import Code, Region, UnitNames, become
from .trace import UntraceableError, argument_name, has_forward, own_graph, result


class Flat:
    """A module's graph with the graphs of containers that it calls in the place of the calls."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.graph = Graph()
        self.opened: list[str] = []
        self.skipped: list[str] = []

    def units(self) -> list[Unit]:
        return find_units(self.graph, self.module)


class Graphs:
    """The graphs of a model's modules, each traced once."""

    def __init__(self) -> None:
        self._own: dict[nn.Module, Graph | UntraceableError] = {}
        self._reads: dict[nn.Module, tuple[Read, ...]] = {}

    def own(self, module: nn.Module) -> Graph | UntraceableError:
        if module not in self._own:
            try:
                self._own[module], self._reads[module] = own_graph(module)
            except UntraceableError as problem:
                # Without its traceback, which would keep the forward's contexts open.
                self._own[module] = UntraceableError(str(problem))
        return self._own[module]

    def reads(self, module: nn.Module, opened: list[str]) -> tuple[Read, ...]:
        """What the forwards of `module` and of the containers that it opens read."""
        return tuple(
            Read(f"{name}.{read.path}".strip("."), read.name)
            for name in ("", *opened)
            for read in self._reads[module.get_submodule(name)]
        )

    def units(self, module: nn.Module) -> list[Unit]:
        """The units of the region that `module` would be, in the order in which they end."""
        if is_layer(module) or not isinstance(self.own(module), Graph):
            return []
        units = self.flat(module, lambda name: True).units()
        opened = {"", *_to_open(units)}
        return [unit for unit in units if all(n.meta["owner"] in opened for n in unit.nodes)]

    def refuse(self, module: nn.Module, reason: str) -> None:
        """Note that `module` can't become a region."""
        self._own[module] = UntraceableError(reason)

    def why_left(self, model: nn.Module, name: str) -> str:
        """Why a layer of `model` is in no unit."""
        parts = name.split(".")
        for i in reversed(range(len(parts))):
            parent_name, layer = ".".join(parts[:i]), ".".join(parts[i:])
            parent = model.get_submodule(parent_name)
            if isinstance(parent, nn.ModuleList | nn.ModuleDict) and not has_forward(parent):
                continue
            graph = self.own(parent)
            kind = type(parent).__name__
            if isinstance(graph, UntraceableError):
                return f"the forward of {parent_name or 'the model'} ({kind}) {graph}"
            for node in graph.nodes:
                if node.op == "call_module" and node.target == layer:
                    return why_no_unit(node, parent)
            return f"{parent_name or 'the model'} ({kind}) does not call it"
        raise AssertionError(name)

    def can_open(self, module: nn.Module) -> bool:
        graph = None if is_layer(module) else self.own(module)
        return isinstance(graph, Graph) and isinstance(result(graph), Node)

    def flat(self, module: nn.Module, opens: Callable[[str], bool]) -> Flat:
        """The graph of `module`, in which the containers that `opens` wants are opened.

        A node's `meta["owner"]` is the name of the container whose forward made it.
        """
        flat = Flat(module)
        graph = self.own(module)
        assert isinstance(graph, Graph)
        x = flat.graph.placeholder(argument_name(module))
        flat.graph.output(self._inline(flat, graph, x, "", opens))
        return flat

    def _inline(
        self, flat: Flat, graph: Graph, x: Node, owner: str, opens: Callable[[str], bool]
    ) -> Any:
        values: dict[Node, Any] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "output":
                return _map(node.args[0], values)
            elif node.op in ("call_module", "get_attr"):
                name = f"{owner}.{node.target}".removeprefix(".")
                values[node] = self._call(flat, node, name, owner, values, opens)
            else:
                values[node] = _copy(flat, node, node.target, owner, values)
        raise AssertionError("a graph without an output")

    def _call(
        self,
        flat: Flat,
        node: Node,
        name: str,
        owner: str,
        values: dict[Node, Any],
        opens: Callable[[str], bool],
    ) -> Any:
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            module = flat.module.get_submodule(name)
            argument = _map(node.args[0], values)
            if isinstance(argument, Node):
                if type(module) is nn.Identity:
                    flat.skipped.append(name)
                    return argument
                if name not in flat.opened and self.can_open(module) and opens(name):
                    flat.opened.append(name)
                    graph = self.own(module)
                    assert isinstance(graph, Graph)
                    return self._inline(flat, graph, argument, name, opens)
        return _copy(flat, node, name, owner, values)


def _map(argument: Any, values: dict[Node, Any]) -> Any:
    return map_arg(argument, lambda node: values[node])


def _copy(flat: Flat, node: Node, target: Any, owner: str, values: dict[Node, Any]) -> Node:
    new = flat.graph.create_node(
        node.op, target, _map(node.args, values), _map(node.kwargs, values)
    )
    new.meta["owner"] = owner
    return new


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one layer, not a container of others."""
    return (
        isinstance(module, nn.Conv2d | _BatchNorm)
        or type(module) in FROZEN
        or (
            type(module).__module__.startswith("torch.nn.")
            and not isinstance(module, nn.Sequential)
        )
    )


def owner_of(unit: Unit) -> str:
    """The innermost container that calls all of a unit."""
    owners = [node.meta["owner"].split(".") for node in unit.nodes]
    common: list[str] = []
    for parts in zip(*owners, strict=False):
        if len(set(parts)) != 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _to_open(units: list[Unit]) -> set[str]:
    """The containers that a region opens: those of its own units, in a block those of all."""
    own = [unit for unit in units if owner_of(unit) == ""]
    if not own:
        return set()
    wanted = {node.meta["owner"] for unit in own for node in unit.nodes}
    if any(unit.add is not None for unit in own):
        blocks = {owner_of(unit) for unit in units if unit.add is not None} - {""}
        for unit in units:
            owner = owner_of(unit)
            if not any(owner == b or owner.startswith(b + ".") for b in blocks):
                wanted |= {node.meta["owner"] for node in unit.nodes}
    return {
        ".".join(parts[:i])
        for parts in (name.split(".") for name in wanted if name)
        for i in range(1, len(parts) + 1)
    }


def become_region(module: nn.Module, graphs: Graphs) -> None:
    """Make `module` a region if it has units of its own, or blocks in a row that may wait."""
    if is_layer(module) or not isinstance(graphs.own(module), Graph):
        return
    whole = graphs.flat(module, lambda name: True)
    wanted = _to_open(whole.units())
    flat = graphs.flat(module, wanted.__contains__)
    units = flat.units()
    runs = [run for run in _runs(flat) if sum(_blocks(module_of(n, module)) for n in run) > 1]
    if not wanted and not any(owner_of(unit) == "" for unit in units) and not runs:
        return
    if not units and type(module) is nn.Sequential:
        return  # left as it is, so that other regions know it for what it is
    try:
        become(module, _code(module, flat, graphs, wanted, units, runs))
    except Exception as problem:  # somebody's metaclass or __init_subclass__
        graphs.refuse(module, f"can't be replaced: {type(problem).__name__}: {problem}")


def _code(
    module: nn.Module,
    flat: Flat,
    graphs: Graphs,
    wanted: set[str],
    units: list[Unit],
    runs: list[list[Node]],
) -> Code:
    with_conv = [unit for unit in units if unit.conv is not None]
    ends = {unit.nodes[-1] for unit in with_conv}
    rest = [n for n in flat.graph.nodes if n.op not in ("placeholder", "output")]
    covered = {node for unit in with_conv for node in unit.nodes}
    output = result(flat.graph)
    waits = (
        bool(units)
        and len(with_conv) == len(units)
        and covered.issuperset(rest)
        and output is rest[-1]
        and output in ends
    )
    names = tuple(_names(unit, module) for unit in with_conv)
    folded_source = ""
    scope: dict[str, Any] = {}
    if with_conv and isinstance(output, Node) and output.target is not OrderedDict:
        copy = graphs.flat(module, wanted.__contains__)
        for unit in copy.units():
            if unit.conv is not None:
                _fold(copy.graph, unit, module)
        folded_source = _source(copy.graph, "_folded", scope)
    _fuse(flat, units, runs)
    fused_source = _source(flat.graph, "_fused", scope)
    return Code(
        argument_name(module), fused_source, folded_source, names,
        tuple(flat.opened), graphs.reads(module, flat.opened),
        tuple(dict.fromkeys(flat.skipped)), waits, scope,
    )  # fmt: skip


def _names(unit: Unit, module: nn.Module) -> UnitNames:
    assert unit.conv is not None and unit.bn is not None
    relu = unit.relu
    return UnitNames(
        str(unit.conv.target),
        str(unit.bn.target),
        str(relu.target) if relu is not None and relu.op == "call_module" else None,
        has_relu(module_of(unit.bn, module)),
    )


def _source(graph: Graph, name: str, scope: dict[str, Any]) -> str:
    """The source of a method of that name; what it needs goes into `scope`."""
    code = graph.python_code("self")
    scope.update(code.globals)
    return code.src.replace("def forward(", f"def {name}(", 1)


def _attribute(graph: Graph, name: str) -> Node:
    return graph.create_node("get_attr", name)


def _fuse(flat: Flat, units: list[Unit], runs: list[list[Node]]) -> None:
    """Put the calls of the fused functions in the places of units and of what takes theirs."""
    graph, module = flat.graph, flat.module
    pending: dict[Node, bool] = {}  # results whose BatchNorm is still to come: with ReLU or not
    for unit in units:
        end = unit.nodes[-1]
        with graph.inserting_before(end):
            relu = None
            if unit.relu is not None:
                if unit.relu.op == "call_module":
                    relu = _attribute(graph, str(unit.relu.target))
                else:
                    relu = graph.call_function(plain_relu)
            if unit.conv is None:
                new = graph.call_function(add_relu, (relu, unit.x, unit.shortcut))
            else:
                layers = [_attribute(graph, str(n.target)) for n in (unit.conv, unit.bn)]
                packed = _attribute(graph, "_packed")
                if unit.add is not None:
                    arguments = (*layers, relu, unit.x, unit.shortcut, packed)
                    new = graph.call_function(unit_add_relu, arguments)
                elif unit.ends_in_relu:
                    new = graph.call_function(conv_bn_relu, (*layers, relu, unit.x, packed))
                    pending[new] = True
                else:
                    new = graph.call_function(conv_bn, (*layers, unit.x, packed))
                    pending[new] = False
        end.replace_all_uses_with(new)
        for node in reversed(unit.nodes):
            graph.erase_node(node)
    for run in runs:
        _wait(graph, run)
    for node, relu in pending.items():
        _finish(graph, module, node, relu)


def _finish(graph: Graph, module: nn.Module, node: Node, relu: bool) -> None:
    """Leave the BatchNorm of `node` to who takes it, if that can apply it."""
    users = list(node.users)
    if len(users) == 1:
        (user,) = users
        if user.target in (conv_bn_relu, conv_bn, unit_add_relu):
            place = user.args.index(node)
            if relu and place == len(user.args) - 2 - (user.target is unit_add_relu):
                return
            if not relu and user.target is unit_add_relu and place == 4:
                return
        if relu and isinstance(module_of(user, module), nn.MaxPool2d) and user.args == (node,):
            with graph.inserting_before(user):
                pool = _attribute(graph, str(user.target))
                pooled = graph.call_function(max_pool, (pool, node))
            user.replace_all_uses_with(pooled)
            graph.erase_node(user)
            return
    with graph.inserting_after(node):
        finished = graph.call_function(finish, (node,), {"relu": relu})
    node.replace_all_uses_with(finished, delete_user_cb=lambda user: user is not finished)


def _fold(graph: Graph, unit: Unit, module: nn.Module) -> None:
    """Put TorchScript's form of a unit with running statistics in its place."""
    assert unit.conv is not None and unit.bn is not None
    end = unit.nodes[-1]
    with graph.inserting_before(end):
        conv, bn = (str(node.target) for node in (unit.conv, unit.bn))
        arguments = [
            unit.x,
            *(_attribute(graph, f"{conv}.{name}") for name in ("weight", "bias")),
            *(_attribute(graph, f"{bn}.{name}") for name in ("running_mean", "running_var")),
            *(_attribute(graph, f"{bn}.{name}") for name in ("weight", "bias", "eps")),
            *(
                _attribute(graph, f"{conv}.{n}")
                for n in ("stride", "padding", "dilation", "groups")
            ),
        ]
        if unit.add is not None:
            new = graph.call_function(folded_add_relu, (*arguments, unit.shortcut))
        else:
            new = graph.call_function(folded, (*arguments, unit.ends_in_relu, None))
    end.replace_all_uses_with(new)
    for node in reversed(unit.nodes):
        graph.erase_node(node)


def _runs(flat: Flat) -> list[list[Node]]:
    """Calls in a row of modules whose units may wait."""
    runs: list[list[Node]] = []
    for node in flat.graph.nodes:
        if not (can_chain(module_of(node, flat.module)) and len(node.args) == 1):
            continue
        before = node.args[0]
        if runs and runs[-1][-1] is before and len(before.users) == 1:
            runs[-1].append(node)
        else:
            runs.append([node])
    return runs


def _wait(graph: Graph, run: list[Node]) -> None:
    first, last = run[0], run[-1]
    (x,) = first.args
    with graph.inserting_before(first):
        modules = [_attribute(graph, str(node.target)) for node in run]
        start = graph.call_function(start_chain, (x, *modules))
    first.args = (start,)
    with graph.inserting_after(last):
        end = graph.call_function(end_chain, (last, x))
    last.replace_all_uses_with(end, delete_user_cb=lambda user: user is not end)


def can_chain(module: nn.Module | None) -> bool:
    """Whether a module's units could wait, as far as its class says."""
    if type(module) is nn.Sequential:
        return len(module) > 0 and all(can_chain(m) for m in module)
    if isinstance(module, Region):
        return module._code.waits
    return isinstance(module, FusedUnits) and hasattr(module, "downsample")


def _blocks(module: nn.Module | None) -> int:
    return len(module) if isinstance(module, nn.Sequential) else 1

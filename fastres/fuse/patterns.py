"""Units in a graph of modules: conv -> bn [-> add] [-> relu], and add -> relu."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F

from ..nn.norm import FROZEN, has_relu

_RELUS = {torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"}
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE = {
    operator.setitem, operator.iadd, operator.isub, operator.imul,
    operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
}  # fmt: skip
# What gives a tensor of its own, whatever it takes.
_MAKES_NEW = {operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.mul}


@dataclass(frozen=True)
class Unit:
    """Nodes that the fused ops compute together; those that it lacks are None."""

    conv: Node | None = None
    bn: Node | None = None
    add: Node | None = None
    relu: Node | None = None
    ends_in_relu: bool = False

    @property
    def x(self) -> Any:
        """What the convolution takes, or without one the first summand."""
        return (self.conv or self.add).args[0]

    @property
    def shortcut(self) -> Any:
        """What is added."""
        assert self.add is not None
        if self.conv is None:
            return self.add.args[1]
        return next(summand for summand in self.add.args if summand is not self.bn)

    @property
    def nodes(self) -> list[Node]:
        found = (self.conv, self.bn, self.add, self.relu)
        return [node for node in found if node is not None]

    @property
    def kind(self) -> str:
        names = {"conv": self.conv, "bn": self.bn, "add": self.add}
        found = [name for name, node in names.items() if node is not None]
        return " + ".join([*found, "relu"] if self.ends_in_relu else found)


def find_units(graph: Graph, root: nn.Module) -> list[Unit]:
    """The units in a graph of `root`, in the order in which they end."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    taken: set[Node] = set()
    units = []
    # From the end: of two branches that meet in an add, it is computed with the later one.
    for bn in reversed(list(graph.nodes)):
        unit = _unit_of(bn, root, taken) if is_norm(bn, root) else None
        if unit is not None:
            units.append(unit)
            taken.update(unit.nodes)
    for add in graph.nodes:
        relu = _next(add)
        if (
            add not in taken
            and is_add(add)
            and relu is not None
            and is_relu(relu, root)
            and (not _in_place(add, root) or _is_fresh(add.args[0], root))
        ):
            units.append(Unit(None, None, add, relu, True))
    moved = {node for unit in units for node in unit.nodes}
    changes = [order[n] for n in graph.nodes if n not in moved and _in_place(n, root)]
    # A unit is computed where it ends: nobody may change its input before.
    return sorted(
        (
            unit
            for unit in units
            if not any(order[unit.nodes[0]] < i < order[unit.nodes[-1]] for i in changes)
        ),
        key=lambda unit: order[unit.nodes[-1]],
    )


def why_no_unit(conv: Node, root: nn.Module) -> str:
    """Why the node of a convolution or a BatchNorm is in no unit."""
    module: Any = module_of(conv, root)
    if not isinstance(module, nn.Conv2d):
        if type(module) not in FROZEN:
            return f"is a {type(module).__name__}, which the fused ops do not know"
        if not _takes_one(conv):
            return "is called with other arguments than one tensor"
        if not (is_conv(conv.args[0], root) and _next(conv.args[0]) is conv):
            return "does not follow a convolution whose result it alone takes"
        return "something is changed in place before its unit ends"
    if type(module) is not nn.Conv2d:
        return f"is a {type(module).__name__}, not a Conv2d"
    if module.padding_mode != "zeros":
        return f"pads by {module.padding_mode!r}, not with zeros"
    if type(module.padding) is not tuple:
        return f"pads by {module.padding!r}, not by numbers"
    if not _takes_one(conv):
        return "is called with other arguments than one tensor"
    users = list(conv.users)
    if len(users) > 1:
        return "its result is used more than once"
    follower = module_of(users[0], root)
    if follower is None:
        return "no BatchNorm2d follows it"
    if type(follower) in FROZEN:
        return why_no_unit(users[0], root)
    return f"is followed by {type(follower).__name__}, not by BatchNorm2d"


def _unit_of(bn: Node, root: nn.Module, taken: set[Node]) -> Unit | None:
    conv = bn.args[0] if len(bn.args) == 1 and not bn.kwargs else None
    if not isinstance(conv, Node) or _next(conv) is not bn or not is_conv(conv, root):
        return None
    norm: Any = module_of(bn, root)
    if has_relu(norm):
        return Unit(conv, bn, ends_in_relu=True)
    follower = _next(bn)
    if follower is not None and is_relu(follower, root):
        return Unit(conv, bn, relu=follower, ends_in_relu=True)
    if follower is not None and follower not in taken and is_add(follower):
        relu = _next(follower)
        left, right = follower.args
        fits = not _in_place(follower, root) or _is_fresh(left, root)
        if relu is not None and is_relu(relu, root) and left is not right and fits:
            return Unit(conv, bn, follower, relu, True)
    return Unit(conv, bn)


def module_of(node: Node, root: nn.Module) -> nn.Module | None:
    """The module that a node calls, if it calls one."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_conv(node: Node, root: nn.Module) -> bool:
    """Whether a node calls a convolution that the fused ops may compute."""
    conv: Any = module_of(node, root)
    return (
        type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and type(conv.padding) is tuple
        and _takes_one(node)
    )


def is_norm(node: Node, root: nn.Module) -> bool:
    norm: Any = module_of(node, root)
    return type(norm) in FROZEN and _takes_one(node)


def is_relu(node: Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return type(module_of(node, root)) is nn.ReLU and _takes_one(node)
    rest = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    return node.target in _RELUS and node.op.startswith("call") and len(node.args) == 1 and not rest


def is_add(node: Node) -> bool:
    """Whether a node is the sum of two tensors (that are not the same)."""
    return (
        node.op in ("call_function", "call_method")
        and node.target in _ADDS
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(argument, Node) for argument in node.args)
        and node.args[0] is not node.args[1]
    )


def _takes_one(node: Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], Node) and not node.kwargs


def _next(node: Node) -> Node | None:
    """The only node that takes this one's result, if there is just one and it is no output."""
    users = list(node.users)
    if len(users) != 1 or users[0].op == "output":
        return None
    return users[0] if users[0].all_input_nodes.count(node) == 1 else None


def _in_place(node: Node, root: nn.Module) -> bool:
    """Whether a node may change a tensor that it takes."""
    module = module_of(node, root)
    if module is not None:
        return any(getattr(part, "inplace", False) for part in module.modules())
    name = str(getattr(node.target, "__name__", node.target))
    return node.op.startswith("call") and (
        node.target in _IN_PLACE
        or (name.endswith("_") and not name.endswith("__"))
        or bool(node.kwargs.get("inplace"))
        or node.kwargs.get("out") is not None
    )


def _is_fresh(node: Node, root: nn.Module) -> bool:
    """Whether nobody else can see a node's result, not even by what it was made from."""
    if node.op in ("placeholder", "get_attr") or len(node.users) != 1:
        return False
    if node.target in _MAKES_NEW or is_norm(node, root):
        return True
    return all(len(source.users) == 1 for source in node.all_input_nodes)


def layers_of(unit: Unit) -> Iterator[str]:
    """The names of the modules that a unit computes."""
    for node in unit.nodes:
        if node.op == "call_module":
            yield str(node.target)

"""What `fuse_model` fused and what it left, as the user sees it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FusedUnit:
    """Layers that the fused ops compute together.

    Attributes:
        layers: the layers' names in the model, in the order in which they are computed.
        kind: what they are together: ``"conv + bn + relu"``, ``"conv + bn + add + relu"`` ...
        note: what is to be known about it, or "".
    """

    layers: tuple[str, ...]
    kind: str
    note: str = ""


@dataclass(frozen=True)
class LeftLayer:
    """A convolution, a BatchNorm or a module that runs as before.

    Attributes:
        name: its name in the model; "" is the model itself.
        reason: why.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class FuseReport:
    """What `fuse_model` did; printed, a table.

    Attributes:
        fused: what the fused ops compute, in the model's order.
        left: what runs as before, in the model's order.
    """

    fused: tuple[FusedUnit, ...]
    left: tuple[LeftLayer, ...]

    def __str__(self) -> str:
        rows = [
            *((unit.kind, ", ".join(unit.layers), unit.note) for unit in self.fused),
            *(("left as it was", layer.name or "the model", layer.reason) for layer in self.left),
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines = [
            f"{kind:<{widths[0]}}  {names:<{widths[1]}}  {note}".rstrip()
            for kind, names, note in rows
        ]
        counts = f"{len(self.fused)} units fused, {len(self.left)} layers left as they were"
        return "\n".join([counts, *lines])

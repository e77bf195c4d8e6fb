"""`summary(model, input_size)`: a table of modules, output sizes, parameters, multiply-adds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn


@dataclass(frozen=True)
class Row:
    """One module. Counts include everything inside it; multiply-adds are for the whole batch."""

    name: str
    kind: str
    depth: int
    output_size: tuple[int, ...] | None
    params: int
    mult_adds: int


@dataclass(frozen=True, repr=False)
class Summary:
    """What :func:`summary` found; ``print`` shows it as a table."""

    title: str
    input_size: tuple[int, ...]
    rows: tuple[Row, ...]
    depth: int
    params: int
    trainable_params: int
    mult_adds: int

    def __rich__(self) -> Table:
        table = Table(
            title=f"{self.title}, input {_size(self.input_size)}",
            caption=f"trainable parameters: {self.trainable_params:,}",
            show_footer=True,
        )
        table.add_column("module", footer="total", no_wrap=True)
        table.add_column("type", no_wrap=True)
        table.add_column("output size", justify="right", no_wrap=True)
        table.add_column("parameters", f"{self.params:,}", justify="right", no_wrap=True)
        table.add_column("multiply-adds", f"{self.mult_adds:,}", justify="right", no_wrap=True)
        for row in self.rows:
            if row.depth <= self.depth:
                table.add_row(
                    "  " * (row.depth - 1) + row.name.rpartition(".")[2],
                    row.kind,
                    _size(row.output_size),
                    f"{row.params:,}" if row.params else "-",
                    f"{row.mult_adds:,}" if row.mult_adds else "-",
                )
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()

    def __repr__(self) -> str:
        return (
            f"Summary({self.title}, input {_size(self.input_size)}: {self.params:,} parameters, "
            f"{self.mult_adds:,} multiply-adds)"
        )


def summary(
    model: nn.Module,
    input_size: int | Sequence[int] = 224,
    *,
    depth: int = 2,
    show: bool = True,
) -> Summary:
    """Run ``model`` once on zeros and print the table of its modules.

    Multiply-adds are those of convolutions and linear layers, the usual count in papers. The model
    is run in eval mode without gradients and left as it was.

    Args:
        model: takes one float tensor.
        input_size: ``(N, C, H, W)``, ``(C, H, W)`` for one image, or the side of one RGB image.
        depth: how deep in the module tree the printed table goes; ``rows`` always has all.
        show: print the table.

    Raises:
        ValueError: ``input_size`` is none of these.
    """
    size = _input_size(input_size)
    output_sizes: dict[nn.Module, tuple[int, ...]] = {}
    own_mult_adds: dict[nn.Module, int] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if isinstance(output, Tensor):
            output_sizes[module] = tuple(output.shape)
            # A module that is used twice computes twice.
            own_mult_adds[module] = own_mult_adds.get(module, 0) + _mult_adds(module, output)

    like = next(model.parameters(), torch.empty(0))
    was_training = {module: module.training for module in model.modules()}
    hooks = [module.register_forward_hook(record) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(size, dtype=like.dtype, device=like.device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in was_training.items():
            module.training = training

    rows = tuple(
        Row(
            name=name,
            kind=type(module).__name__,
            depth=name.count(".") + 1,
            output_size=output_sizes.get(module),
            params=sum(p.numel() for p in module.parameters()),
            mult_adds=sum(own_mult_adds.get(m, 0) for m in module.modules()),
        )
        for name, module in model.named_modules()
        if name
    )
    result = Summary(
        title=type(model).__name__,
        input_size=size,
        rows=rows,
        depth=depth,
        params=sum(p.numel() for p in model.parameters()),
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        mult_adds=sum(own_mult_adds.values()),
    )
    if show:
        Console().print(result)
    return result


def _mult_adds(module: nn.Module, output: Tensor) -> int:
    """Each output element of a convolution or linear layer is one dot product."""
    if isinstance(module, nn.Conv2d):
        return output.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    return 0


def _input_size(size: int | Sequence[int]) -> tuple[int, ...]:
    full = (1, 3, size, size) if isinstance(size, int) else tuple(size)
    if len(full) == 3:
        full = (1, *full)
    if len(full) != 4 or not all(isinstance(n, int) and n > 0 for n in full):
        raise ValueError(
            f"summary: input_size is {size!r}; expected (N, C, H, W), (C, H, W) or a side length, "
            "all positive"
        )
    return full


def _size(size: tuple[int, ...] | None) -> str:
    return "-" if size is None else "x".join(map(str, size))

"""Draw what a residual block moves through memory: torch op by op beside fastres.

    python tools/draw_dataflow.py [--out docs]

writes dataflow-inference.svg, dataflow-training.svg and bytes-training.svg. Nothing in them is
written by hand: both blocks pass over tensors without memory ("meta"), every op that computes an
activation is recorded in torch's dispatcher, and bytes are those of the recorded tensors' shapes.

Each tensor that an op reads or writes counts once: the least that any kernel of that op can move.
What a kernel reads twice, as BatchNorm its input in training, counts once too, for both sides.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock

from fastres.models.resnet import FusedBasicBlock

# (N, C, H, W) of a block of ResNet-18's first stage.
SHAPE = (16, 64, 56, 56)
SIDES = {"torch, op by op": BasicBlock, "fastres": FusedBasicBlock}
READ, WRITE, INK, FAINT = "#3b75af", "#d9822b", "#1f2328", "#8a929b"
SAME_MEMORY = ("detach", "view", "t", "expand", "alias")


@dataclass(frozen=True)
class Pass:
    """One op's way over memory.

    Attributes:
        label: what it computes.
        reads, writes: (a number that stands for the tensor's memory and its state, bytes).
        backward: whether it belongs to the backward.
    """

    label: str
    reads: tuple[tuple[int, int], ...]
    writes: tuple[tuple[int, int], ...]
    backward: bool

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in (*self.reads, *self.writes))


def _label(name: str, given: dict[str, Any]) -> str:
    """What a call of the dispatcher's op `name` computes."""
    kernel = (
        "\N{MULTIPLICATION SIGN}".join(map(str, given["weight"].shape[2:]))
        if "conv" in name
        else ""
    )
    if name == "conv_bn_relu":
        parts = [f"conv {kernel}", "BatchNorm", *["add"] * (given["residual"] is not None)]
        return " + ".join([*parts, *["ReLU"] * given["relu"]])
    if name == "conv_stats":
        before = "BatchNorm + ReLU + " if given["in_mean"] is not None else ""
        return f"{before}conv {kernel} + sums"
    if name == "conv_stats_backward":
        after = "ReLU + BatchNorm + " if given["in_mean"] is not None else ""
        return f"{after}conv {kernel}, gradient"
    return {
        "convolution": f"conv {kernel}",
        "convolution_backward": f"conv {kernel}, gradient",
        "native_batch_norm": "BatchNorm",
        "native_batch_norm_backward": "BatchNorm, gradient",
        "relu_": "ReLU",
        "threshold_backward": "ReLU, gradient",
        "add_": "add",
        "add": "add both gradients",
        "bn_add_relu": "BatchNorm + add + ReLU",
        "bn_add_relu_backward": "ReLU + add + BatchNorm, gradient",
    }[name]


class Recorder(TorchDispatchMode):
    """Collects the passes over activations, i.e. over tensors of four dimensions.

    Args:
        input: the block's, the first tensor that is there before any pass.
    """

    def __init__(self, input: Tensor) -> None:
        super().__init__()
        self.passes: list[Pass] = []
        self.backward = False
        self._kept: list[Tensor] = []  # so that no memory is used a second time
        self._states: dict[int, int] = {}  # memory -> what it holds now
        self.input = self._state(input)

    def _state(self, tensor: Tensor, new: bool = False) -> int:
        self._kept.append(tensor)
        memory = tensor.untyped_storage()._cdata
        if new or memory not in self._states:
            self._states[memory] = len(self._kept)
        return self._states[memory]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        if name == "bn_add_relu_backward" and given["residual_mean"] is None:
            del given["residual"]  # only a residual with a BatchNorm is read
        inputs = [t for t in given.values() if isinstance(t, Tensor) and t.numel()]
        results = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        results = [t for t in results if isinstance(t, Tensor) and t.numel()]
        if name in SAME_MEMORY or all(t.dim() < 4 for t in (*inputs, *results)):
            return outputs
        reads = {self._state(t): t.nbytes for t in inputs}
        writes = {self._state(t, new=True): t.nbytes for t in results}
        label = _label(name, given)
        if self.backward and not name.endswith("_backward") and name != "add":
            label += ", again"
        self.passes.append(Pass(label, tuple(reads.items()), tuple(writes.items()), self.backward))
        return outputs


def record(block: type[nn.Module], training: bool) -> tuple[list[Pass], int]:
    """The passes of a block in `SHAPE`, forward or (training) forward and backward, and its input.

    Returns:
        The passes in their order, and the number in `Pass.reads` that stands for the input.
    """
    with torch.device("meta"):
        module = block(SHAPE[1], SHAPE[1]).train(training)
        x = torch.empty(SHAPE).contiguous(memory_format=torch.channels_last)
        dy = torch.empty_like(x)
    x.requires_grad_(training)
    with torch.set_grad_enabled(training), Recorder(x) as recorder:
        y = module(x)
        recorder.backward = True
        if training:
            torch.autograd.grad(y, [x, *module.parameters()], dy)
    return recorder.passes, recorder.input


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


def _total(passes: Sequence[Pass]) -> str:
    return f"{len(passes)} passes, {megabytes(sum(p.nbytes for p in passes))}"


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    shape = {"arrowstyle": "-|>", "color": READ, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=shape)


def _flows(passes: Sequence[Pass], input: int, activation: int) -> list[tuple[int, int]]:
    """From which pass (-1: the input) to which (their number: the output) activations go."""
    made_by = {input: -1}
    found: list[tuple[int, int]] = []
    for place, one in enumerate(passes):
        found += [(made_by[t], place) for t, size in one.reads if size == activation]
        made_by |= {t: place for t, size in one.writes if size == activation}
    return [*found, (made_by[passes[-1].writes[0][0]], len(passes))]


def _draw_flow(ax: Axes, title: str, passes: Sequence[Pass], input: int, rows: int) -> None:
    """A column of boxes with the activations that go from one to another."""
    activation = 4 * torch.Size(SHAPE).numel()
    size = megabytes(activation)
    ax.set_xlim(-3.1, 2.5)
    ax.set_ylim(-rows - 1.1, 0.9)
    ax.set_axis_off()
    ax.text(0, 0.75, title, ha="center", weight="bold", size=11, color=INK)
    ax.text(0, 0.42, _total(passes), ha="center", size=9.5, color=INK)
    flows = _flows(passes, input, activation)
    for start, end in flows:
        from_y, to_y = -start - 1.0, -end - 1.0
        if end - start == 1:
            top = from_y - (0.12 if start < 0 else 0.2)
            bottom = to_y + (0.12 if end == len(passes) else 0.24)
            _arrow(ax, (0, top), (0, bottom))
            ax.text(0.12, (top + bottom) / 2, size, va="center", size=8, color=READ)
        else:
            side = -2.15
            ax.plot([-0.2 if start < 0 else -1.8, side, side], [from_y, from_y, to_y], color=READ,
                    linewidth=1.6, solid_capstyle="round")  # fmt: skip
            _arrow(ax, (side, to_y), (-1.78, to_y))
            ax.text(side - 0.08, (from_y + to_y) / 2, size, size=8, color=READ, rotation=90,
                    va="center", ha="right")  # fmt: skip
    for y, name in ((0.0, "x"), (-len(passes) - 1.0, "y")):
        ax.text(0, y, name, ha="center", va="center", size=10, style="italic", color=INK)
    for place, one in enumerate(passes):
        fused = " + " in one.label
        box = FancyBboxPatch((-1.75, -place - 1.2), 3.5, 0.4, linewidth=1.2,
                             boxstyle="round,pad=0.03,rounding_size=0.1",
                             facecolor="#e7f1ea" if fused else "#f2f4f6",
                             edgecolor="#4b8b5f" if fused else FAINT)  # fmt: skip
        ax.add_patch(box)
        ax.text(0, -place - 1.0, one.label, ha="center", va="center", size=8.5, color=INK)


def flow_figure(training: bool) -> Figure:
    """The forward of both sides, boxes and the tensors between them."""
    found = {title: record(block, training) for title, block in SIDES.items()}
    forward = {
        title: ([p for p in passes if not p.backward], input)
        for title, (passes, input) in found.items()
    }
    rows = max(len(passes) for passes, _ in forward.values())
    figure = Figure(figsize=(8.6, 0.62 * (rows + 2)), layout="constrained")
    for ax, (title, (passes, input)) in zip(figure.subplots(1, 2), forward.items(), strict=True):
        _draw_flow(ax, title, passes, input, rows)
    return figure


def bytes_figure() -> Figure:
    """A bar for every pass of a training step, forward and backward, of both sides."""
    figure = Figure(figsize=(8.6, 6.2), layout="constrained")
    found = {title: record(block, True)[0] for title, block in SIDES.items()}
    counts = [len(passes) + 1 for passes in found.values()]
    axes = figure.subplots(2, 1, sharex=True, height_ratios=counts)
    for ax, (title, passes) in zip(axes, found.items(), strict=True):
        places = [i + one.backward for i, one in enumerate(passes)]  # a gap before the backward
        read = [sum(size for _, size in one.reads) / 1e6 for one in passes]
        written = [sum(size for _, size in one.writes) / 1e6 for one in passes]
        ax.barh(places, read, color=READ, height=0.72, label="read")
        ax.barh(places, written, left=read, color=WRITE, height=0.72, label="written")
        ax.set_yticks(places, [one.label for one in passes], size=8.5, color=INK)
        ax.invert_yaxis()
        ax.set_title(f"{title}: {_total(passes)}", size=10.5, weight="bold", loc="left", color=INK)
        ax.spines[["top", "right"]].set_visible(False)
        gap = places[[one.backward for one in passes].index(True)] - 1
        ax.axhline(gap, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.text(1, gap - 0.15, "backward below", size=8, color=FAINT, ha="right", va="bottom",
                transform=ax.get_yaxis_transform())  # fmt: skip
    axes[0].legend(frameon=False, loc="lower right", fontsize=8.5)
    axes[1].set_xlabel("MB", color=INK)
    return figure


FIGURES = {
    "dataflow-inference": lambda: flow_figure(training=False),
    "dataflow-training": lambda: flow_figure(training=True),
    "bytes-training": bytes_figure,
}


def write(figure: Figure, path: Path) -> None:
    """An SVG with its text as text, the same bytes in every run."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.family": "sans-serif"}
    with mpl.rc_context(settings):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs")
    options = parser.parse_args(arguments)
    for name, draw in FIGURES.items():
        write(draw(), options.out / f"{name}.svg")


if __name__ == "__main__":
    main()

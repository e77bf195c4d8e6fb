"""Loss and accuracy against the epoch, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastres.train.files import write_atomically


def draw_curves(path: Path, history: list[dict[str, Any]], best_epoch: int) -> None:
    """Write a PNG of the training and validation curves in `history` to `path`, atomically."""
    # Imported here: half a second, which no other command should wait for.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [line["epoch"] for line in history]
    marker = "o" if len(epochs) <= 30 else None
    for axes, quantity, unit in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("", " (%)"), strict=True
    ):
        scale = 100 if unit else 1
        for part, colour in (("train", "tab:blue"), ("valid", "tab:orange")):
            values = [scale * line[f"{part}_{quantity}"] for line in history]
            axes.plot(epochs, values, color=colour, marker=marker, markersize=4, label=part)
        axes.axvline(best_epoch, color="grey", linestyle=":", label=f"best epoch ({best_epoch})")
        axes.set(xlabel="epoch", ylabel=f"{quantity}{unit}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))

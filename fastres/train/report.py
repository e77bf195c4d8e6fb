"""What a person sees: the progress bar, a line an epoch, the table at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from fastres.train.inference import Prediction
    from fastres.train.loop import Result
    from fastres.train.meter import Meter
    from fastres.train.outcomes import Outcomes


def make_console(*, enabled: bool = True) -> Console:
    """Where a run is shown. A file or a pipe gets text alone, whatever FORCE_COLOR says."""
    console = Console(quiet=not enabled, highlight=False)
    if console.is_jupyter or console.file.isatty():
        return console
    return Console(quiet=not enabled, highlight=False, force_terminal=False)


class Report:
    """Shows a run on the terminal; silent with `enabled=False`."""

    def __init__(self, epochs: int, steps: int, *, enabled: bool) -> None:
        self.epochs = epochs
        self.steps = steps
        self.console = make_console(enabled=enabled)
        # The bar takes what the rest leaves of the line: 64 columns are enough for all of it.
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[note]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
            transient=True,
            expand=True,
        )
        self.run = self.progress.add_task("run", total=epochs * steps, note="")
        self.epoch = self.progress.add_task("epoch", total=steps, note="")

    def __enter__(self) -> Report:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def _print(self, text: str) -> None:
        """A line for people and for grep: a narrow terminal must not break it in two."""
        self.console.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Say what is not as it should be, though the run goes on."""
        self._print(f"warning: {text}")

    def start(self, text: str) -> None:
        """Say what begins."""
        self._print(text)

    def begin_epoch(self, epoch: int, step: int) -> None:
        """Epoch number `epoch` (0 is the first) begins at step `step`."""
        self.progress.update(self.run, completed=epoch * self.steps + step)
        self.progress.reset(
            self.epoch, total=self.steps, description=f"epoch {epoch + 1}/{self.epochs}"
        )
        self.progress.update(self.epoch, completed=step, note="")

    def training_step(self, meter: Meter) -> None:
        """A step is done."""
        note = f"loss {meter.mean_loss:.3f}  {meter.images_per_second:,.0f} images/s"
        self.progress.update(self.epoch, completed=meter.step, note=note)
        self.progress.update(self.run, advance=1)

    def end_epoch(self, line: dict[str, Any], *, best: bool) -> None:
        """An epoch is done: loss and accuracy; `line` is its line in metrics.jsonl."""
        self._print(
            f"epoch {line['epoch']:>3}/{self.epochs}"
            f"  train {line['train_loss']:.4f} {line['train_accuracy']:6.2%}"
            f"  valid {line['valid_loss']:.4f} {line['valid_accuracy']:6.2%}"
            f"  lr {line['lr']:g}  {line['images_per_second']:,.0f} images/s"
            f"  {line['seconds']:.1f} s"
            f"{'  best' if best else ''}"
        )

    def end(self, result: Result) -> None:
        """The run is done."""
        table = Table(title="result", show_header=False)
        for name, value in (
            ("epochs", f"{result.epochs} ({result.ended_by})"),
            ("best epoch", str(result.best_epoch)),
            ("valid accuracy", f"{result.valid_accuracy:.2%}"),
            ("test accuracy", f"{result.test_accuracy:.2%}"),
            ("test loss", f"{result.test_loss:.4f}"),
            ("training time", f"{result.seconds:,.1f} s"),
        ):
            table.add_row(name, value)
        self.console.print(table)
        self._print(f"all of it is in {result.folder}")


def print_evaluation(checkpoint: Path, data: str, meter: Meter, outcomes: Outcomes) -> None:
    """What `fastres eval` prints: the whole part's loss and accuracy, then a line a class."""
    print(
        f"{checkpoint}: test loss {meter.mean_loss:.4f}, accuracy {meter.accuracy:.2%} "
        f"({meter.images:,} images of {data})"
    )
    rows = [
        (
            line.name,
            f"{line.accuracy:.2%}" if line.images else "-",
            f"{line.correct:,} of {line.images:,}",
            line.mistaken_for or "-",
        )
        for line in outcomes.per_class()
    ]
    print_columns(("class", "accuracy", "correct", "most mistaken for"), rows, right={1, 2})


def print_predictions(predictions: list[Prediction], *, as_json: bool = False) -> None:
    """What `fastres predict` prints: a line an image, its classes from the likeliest on."""
    if as_json:
        plain = [
            {
                "image": str(prediction.image),
                "classes": [
                    {"class": name, "probability": share} for name, share in prediction.classes
                ],
            }
            for prediction in predictions
        ]
        print(json.dumps(plain, indent=2))
        return
    rows = [
        (
            str(prediction.image),
            *(cell for name, share in prediction.classes for cell in (name, f"{share:.2%}")),
        )
        for prediction in predictions
    ]
    places = range(1, len(predictions[0].classes) + 1)
    header = ("image", *(cell for place in places for cell in (f"class {place}", "")))
    print_columns(header, rows, right={2 * place for place in places})


def print_columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: set[int]) -> None:
    """Aligned columns, those in `right` to the right; a line is never broken, for grep's sake."""
    lines = [header, *rows]
    widths = [max(cell_len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            " " * (width - cell_len(cell)) + cell
            if number in right
            else cell + " " * (width - cell_len(cell))
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())

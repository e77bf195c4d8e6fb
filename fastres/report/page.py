"""The page: what is on it, and its way into one file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from jinja2 import Environment, PackageLoader, StrictUndefined

from fastres.report.chart import Chart, Series, chart
from fastres.report.runs import RunRecord, differing, read_run
from fastres.train import ConfigError
from fastres.train.files import write_text
from fastres.version import __version__

COLOURS = 8  # in the page's style sheet; a ninth run has the first colour again
MOST_CLASSES = 30  # up to which a confusion matrix is shown whole
MOST_PAIRS = 30  # of classes that are confused, in the place of a larger one


@dataclass(frozen=True)
class ReportConfig:
    """Compare runs in one HTML page: settings, curves, results, confusion and worst images.

    The page needs no network and no other file.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")]
    """Folders that `fastres train` made, of runs finished or not."""

    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("report.html")
    """The file to write, or to replace."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("runs is (), expected at least one run's folder")
        if self.out.is_dir() or not self.out.parent.is_dir():
            raise ConfigError(f"out is '{self.out}', expected a file in a folder that exists")


def report(config: ReportConfig) -> Path:
    """Write the page of `config.runs` to `config.out`.

    Raises:
        RunFolderError: a folder has no run in it, or a damaged one.
    """
    write_text(config.out, render([read_run(path) for path in config.runs]))
    return config.out


def render(runs: Sequence[RunRecord]) -> str:
    """The page of `runs` as HTML."""
    runs = list(runs)
    # Names come from users: of folders, of classes, of files. Every one of them is escaped.
    environment = Environment(
        loader=PackageLoader("fastres.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{share:.2%}"
    environment.filters["duration"] = _duration
    tested = [run.result["test_accuracy"] for run in runs if run.result]
    return environment.get_template("page.html").render(
        names=_names([run.path for run in runs]),
        runs=runs,
        best=max(tested) if len(tested) > 1 else None,
        colours=COLOURS,
        differing=differing(runs) if len(runs) > 1 else {},
        charts=_charts(runs),
        confusions=[_confusion(run.test) if run.test else None for run in runs],
        version=__version__,
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names, or the whole paths of those that are not the only one so called."""
    own = [path.resolve().name for path in paths]
    count = Counter(own)
    return [name if count[name] == 1 else str(path) for name, path in zip(own, paths, strict=True)]


def _charts(runs: Sequence[RunRecord]) -> list[Chart]:
    names = _names([run.path for run in runs])

    def series(key: str, scale: float = 1, dashed: bool = False) -> list[Series]:
        part = key.replace("_", " ")
        return [
            Series(
                f"{name}, {part}",
                number,
                dashed,
                tuple((line["epoch"], scale * line[key]) for line in run.history),
            )
            for number, (name, run) in enumerate(zip(names, runs, strict=True))
        ]

    return [
        chart("Loss", series("train_loss", dashed=True) + series("valid_loss")),
        chart(
            "Accuracy",
            series("train_accuracy", 100, dashed=True) + series("valid_accuracy", 100),
            suffix="%",
        ),
        chart("Learning rate", series("lr")),
    ]


def _confusion(test: dict[str, Any]) -> dict[str, Any]:
    """Rows of (count, share of the row), or of more classes the pairs most often confused."""
    classes, counts = test["classes"], test["confusion"]
    totals = [max(1, sum(row)) for row in counts]
    if len(classes) <= MOST_CLASSES:
        rows = [
            [(count, count / total) for count in row]
            for row, total in zip(counts, totals, strict=True)
        ]
        return {"classes": classes, "rows": rows, "pairs": []}
    pairs = [
        (count, classes[label], classes[predicted])
        for label, row in enumerate(counts)
        for predicted, count in enumerate(row)
        if count and label != predicted
    ]
    pairs.sort(key=lambda pair: -pair[0])
    return {"classes": classes, "rows": [], "pairs": pairs[:MOST_PAIRS]}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"

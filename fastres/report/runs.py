"""What a run's folder says of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastres.train import RunFolderError
from fastres.train.run_folder import RunFolder

# Where a run's files are, and not what the run is.
PLACES = frozenset({"out", "root"})


@dataclass(frozen=True)
class RunRecord:
    """A run, as its files have it; `result` and `test` are None while it is not finished."""

    path: Path
    settings: dict[str, Any]
    history: list[dict[str, Any]]
    result: dict[str, Any] | None
    test: dict[str, Any] | None

    @property
    def images_per_second(self) -> float | None:
        """In training, the median of the epochs; None before the first is done."""
        speeds = sorted(line["images_per_second"] for line in self.history)
        return speeds[len(speeds) // 2] if speeds else None


def read_run(path: Path) -> RunRecord:
    """The run in the folder `path`.

    Raises:
        RunFolderError: there is no run in it, or a file of it is damaged.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise RunFolderError(f"no run in {path}: there is no {folder.config.name}")
    settings = _read(folder.config, dict)
    lines = folder.metrics.read_text().splitlines() if folder.metrics.is_file() else []
    history = [_parse(folder.metrics, line, dict) for line in lines]
    for line in history:
        _expect_keys(
            folder.metrics, line, "epoch train_loss valid_loss train_accuracy valid_accuracy lr"
            " images_per_second",
        )  # fmt: skip
    result = _read(folder.result, dict) if folder.result.is_file() else None
    if result is not None:
        _expect_keys(
            folder.result, result, "best_epoch epochs ended_by seconds test_accuracy test_loss"
            " valid_accuracy",
        )  # fmt: skip
    test = _read(folder.test, dict) if folder.test.is_file() else None
    if test is not None:
        _expect_keys(folder.test, test, "classes confusion wrongest")
    return RunRecord(
        path=path,
        settings={name: value for name, value in settings.items() if name not in PLACES},
        history=history,
        result=result,
        test=test,
    )


def differing(runs: list[RunRecord]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, each with its value in every run."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: each for name, each in values.items() if any(v != each[0] for v in each)}


def _read(path: Path, kind: type) -> Any:
    return _parse(path, path.read_text(), kind)


def _parse(path: Path, text: str, kind: type) -> Any:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged: {error}") from error
    if not isinstance(content, kind):
        raise RunFolderError(f"{path} is damaged: it has no {kind.__name__}")
    return content


def _expect_keys(path: Path, content: dict[str, Any], keys: str) -> None:
    if missing := [key for key in keys.split() if key not in content]:
        raise RunFolderError(f"{path} is damaged: it lacks {', '.join(missing)}")

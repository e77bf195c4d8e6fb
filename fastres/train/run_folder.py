"""The folder that a run leaves: every file of it, whole or not there."""

from __future__ import annotations

import csv
import io
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from fastres.data.datasets import FOLDER
from fastres.train import checkpoint
from fastres.train.config import ConfigError, TrainConfig, from_dict, to_dict
from fastres.train.errors import RunFolderError
from fastres.train.files import temporary_name, write_json, write_text


class RunFolder:
    """Paths in a run's folder, and what is written to them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.metrics_csv = path / "metrics.csv"
        self.tensorboard = path / "tensorboard"
        self.best = path / "best.pt"
        self.last = path / "last.pt"
        self.curves = path / "curves.png"
        self.confusion = path / "confusion.png"
        self.wrongest = path / "wrongest.png"
        self.test = path / "test.json"
        self.result = path / "result.json"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return self.last.exists() or checkpoint.previous(self.last).exists()

    @classmethod
    def create(cls, config: TrainConfig) -> RunFolder:
        """A new folder at config.out, or at runs/DATA-MODEL-TIME.

        Raises:
            RunFolderError: there is something in the folder already.
        """
        time = datetime.now().strftime("%Y%m%d-%H%M%S")
        # A folder of pictures is called by its own name, not by its whole path.
        data = Path(config.data.removeprefix(FOLDER)).resolve().name
        path = config.out or Path("runs") / f"{data}-{config.model}-{time}"
        begun = temporary_name(cls(path).config)  # of a run that was killed in this function
        if path.exists() and (not path.is_dir() or any(file != begun for file in path.iterdir())):
            raise RunFolderError(
                f"{path} is not empty: choose another --out, or --resume the run in it"
            )
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        write_json(folder.config, to_dict(config))
        return folder

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The folder of a run that was started before.

        Raises:
            RunFolderError: there is no run in it.
        """
        folder = cls(path)
        if not folder.config.is_file():
            raise RunFolderError(f"no run to resume in {path}: there is no {folder.config.name}")
        return folder

    def read_config(self) -> TrainConfig:
        """The settings of the run.

        Raises:
            RunFolderError: config.json is damaged.
        """
        try:
            return from_dict(json.loads(self.config.read_text()))
        except (ConfigError, ValueError, TypeError) as error:
            raise RunFolderError(f"{self.config} is damaged: {error}") from error

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Every epoch so far, a line each: rewritten whole, so no line is torn or twice there."""
        write_text(self.metrics, "".join(json.dumps(epoch) + "\n" for epoch in history))
        table = io.StringIO()
        if history:
            writer = csv.DictWriter(table, history[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(history)
        write_text(self.metrics_csv, table.getvalue())

"""A run's metrics for TensorBoard."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fastres.train.config import ConfigError


def require_tensorboard() -> None:
    """Say what is missing before a run begins.

    Raises:
        ConfigError: the package tensorboard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tensorboard is True, but the package tensorboard is not installed: "
            "pip install fastres[tensorboard]"
        )


class TensorBoard:
    """Writes a line of metrics an epoch as scalars; nothing with `enabled=False`.

    Epochs from `epoch` (0 is the first) on that were written before are dropped: a run that goes on
    from an earlier epoch writes them again.
    """

    def __init__(self, folder: Path, epoch: int, *, enabled: bool) -> None:
        self._writer = None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=epoch + 1)

    def end_epoch(self, line: dict[str, Any]) -> None:
        """An epoch is done: `line` is its line in metrics.jsonl."""
        if self._writer is None:
            return
        for name, value in line.items():
            if name != "epoch":
                part, _, quantity = name.partition("_")
                tag = f"{quantity}/{part}" if part in ("train", "valid") else name
                self._writer.add_scalar(tag, value, line["epoch"])
        self._writer.flush()

    def end(self, best_epoch: int, test_loss: float, test_accuracy: float) -> None:
        """The run is done: the test part's numbers, at the epoch that they are of."""
        if self._writer is not None:
            self._writer.add_scalar("loss/test", test_loss, best_epoch)
            self._writer.add_scalar("accuracy/test", test_accuracy, best_epoch)
            self._writer.close()

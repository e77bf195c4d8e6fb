"""What is counted while a model trains or is evaluated."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastres.train.errors import NonFiniteLossError

# A GPU is asked for its losses only so often: each question waits for all work in flight.
STEPS_BETWEEN_READS = {"cpu": 1, "cuda": 20}


@dataclass
class Meter:
    """Loss and accuracy over the images seen so far, and how long that took.

    `lr` is the learning rate of the last training step.

    Raises:
        NonFiniteLossError: from `add` or `read`, naming the step, when a loss is NaN or infinite.
    """

    step: int = 0
    images: int = 0
    loss: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    pending: list[tuple[Tensor, Tensor, int]] = field(default_factory=list, repr=False)
    since: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def mean_loss(self) -> float:
        """Mean over the images that have been read."""
        return self.loss / max(self.images, 1)

    @property
    def accuracy(self) -> float:
        """Share of the images that have been read whose class is right."""
        return self.correct / max(self.images, 1)

    @property
    def images_per_second(self) -> float:
        """Images over time, both up to the last read."""
        return self.images / max(self.seconds, 1e-9)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: its mean loss (), logits (N, classes) and labels (N,)."""
        correct = (logits.detach().argmax(1) == labels).sum()
        self.pending.append((loss.detach(), correct, len(labels)))
        if len(self.pending) >= STEPS_BETWEEN_READS.get(loss.device.type, 1):
            self.read()

    def read(self) -> None:
        """Fetch what is still on the device."""
        for loss, correct, n in self.pending:
            self.step += 1
            value = loss.item()
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss is {value} at step {self.step}: try a lower lr, or amp none"
                )
            self.loss += value * n
            self.correct += int(correct.item())
            self.images += n
        self.pending.clear()
        now = time.perf_counter()
        self.seconds += now - self.since
        self.since = now

    def forget_counts(self) -> None:
        """Count images from zero: another process goes on from what was counted before."""
        self.loss, self.correct, self.images = 0.0, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain numbers."""
        names = ("step", "images", "loss", "correct", "seconds", "lr")
        return {name: getattr(self, name) for name in names}

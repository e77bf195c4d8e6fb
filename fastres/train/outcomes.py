"""What a model answered to each image of a part, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ClassAccuracy:
    """How the images of one class fared."""

    name: str
    images: int
    correct: int
    mistaken_for: str | None
    """The wrong class that most of its images got, if any did."""

    @property
    def accuracy(self) -> float:
        """Share of the class's images whose class is right; NaN without images."""
        return self.correct / self.images if self.images else float("nan")


class Outcomes:
    """The answers to the images of a part, in their order; `add` is `evaluate`'s `on_batch`."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self._batches: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: logits (N, classes) and labels (N,)."""
        logits = logits.detach().float()
        share, predicted = logits.softmax(1).max(1)
        losses = F.cross_entropy(logits, labels, reduction="none")
        # Left on the device, so that no step waits for it.
        self._batches.append(torch.stack([labels.double(), predicted, share, losses]))

    def _rows(self) -> Tensor:
        if not self._batches:
            return torch.zeros(4, 0, dtype=torch.float64)
        return torch.cat(self._batches, dim=1).cpu()

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return self._rows()[0].long()

    @property
    def predicted(self) -> Tensor:
        """The likeliest class of each image: (N,) int64."""
        return self._rows()[1].long()

    @property
    def shares(self) -> Tensor:
        """The softmax probability of the likeliest class: (N,) float64."""
        return self._rows()[2]

    @property
    def losses(self) -> Tensor:
        """The cross-entropy of each image: (N,) float64."""
        return self._rows()[3]

    def confusion(self) -> Tensor:
        """How many images of a class (row) got a class (column): (classes, classes) int64."""
        n = len(self.classes)
        return torch.bincount(self.labels * n + self.predicted, minlength=n * n).view(n, n)

    def per_class(self) -> list[ClassAccuracy]:
        """A line for each class, in the order of the classes."""
        lines = []
        for label, counts in enumerate(self.confusion()):
            wrong = counts.clone()
            wrong[label] = 0
            most = int(wrong.argmax())
            lines.append(
                ClassAccuracy(
                    name=self.classes[label],
                    images=int(counts.sum()),
                    correct=int(counts[label]),
                    mistaken_for=self.classes[most] if wrong[most] else None,
                )
            )
        return lines

    def wrongest(self, most: int) -> list[int]:
        """Positions of up to `most` images with a wrong class, those of the highest loss first."""
        wrong = torch.nonzero(self.labels != self.predicted).flatten()
        order = self.losses[wrong].argsort(descending=True, stable=True)
        return wrong[order[:most]].tolist()

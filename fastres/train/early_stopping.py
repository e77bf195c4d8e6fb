"""When to stop, and which epoch was the best."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """Watches the validation accuracy; an epoch is better only if it is strictly above the best.

    The accuracy, and not the loss: after a drop of the learning rate the loss of an ever more
    certain model rises while its accuracy still gains. The default patience is the step schedule's
    period, so that a plateau is left for the next learning rate before it is given up.
    """

    patience: int
    best_epoch: int = 0
    best_accuracy: float = -1.0
    epochs_since_best: int = 0

    @property
    def should_stop(self) -> bool:
        """Whether `patience` epochs in a row were no better."""
        return self.epochs_since_best >= self.patience

    def update(self, epoch: int, accuracy: float) -> bool:
        """Take in an epoch (1 is the first); true if it is the best so far."""
        if accuracy > self.best_accuracy:
            self.best_epoch, self.best_accuracy, self.epochs_since_best = epoch, accuracy, 0
            return True
        self.epochs_since_best += 1
        return False

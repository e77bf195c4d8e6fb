"""How several processes share a batch, and what all batches of one part have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Generic, TypeVar

from torch import Tensor

Part = TypeVar("Part", bound=Sized)


def share_of(start: int, stop: int, share: tuple[int, int]) -> slice:
    """What process `share[0]` of `share[1]` takes of the positions from `start` to `stop`."""
    rank, size = share
    n = stop - start
    return slice(start + n * rank // size, start + n * (rank + 1) // size)


class SharedBatches(Generic[Part]):
    """Base of batches of `part`, of each of which a process takes its share.

    Args:
        part: the images and labels.
        batch_size: images a batch; the last batch may be smaller.
        share: (rank, size) of the process.
    """

    def __init__(self, part: Part, batch_size: int, share: tuple[int, int]) -> None:
        self.part = part
        self.batch_size = batch_size
        self.share = share
        self.epoch = 0

    def __len__(self) -> int:
        """The number of batches."""
        return -(-len(self.part) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation the next iteration takes."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.iterate()

    def iterate(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from number `first` on, exactly as a full iteration would give them."""
        raise NotImplementedError

    def places(self, first: int) -> list[slice]:
        """This process' share of each batch from number `first` on, without empty ones."""
        n = len(self.part)
        starts = range(first * self.batch_size, n, self.batch_size)
        shares = [share_of(i, min(i + self.batch_size, n), self.share) for i in starts]
        return [batch for batch in shares if batch.start < batch.stop]

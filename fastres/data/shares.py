"""How several processes share a batch."""

from __future__ import annotations


def share_of(start: int, stop: int, share: tuple[int, int]) -> slice:
    """What process `share[0]` of `share[1]` takes of the positions from `start` to `stop`."""
    rank, size = share
    n = stop - start
    return slice(start + n * rank // size, start + n * (rank + 1) // size)

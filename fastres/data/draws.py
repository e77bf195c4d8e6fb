"""Random draws that follow from a key alone, on every device and in every process."""

from __future__ import annotations

import numpy as np
import torch

# Streams of draws, the first part of a key, so that no two purposes share one.
SPLIT, EPOCH, PICTURE, FLIP = 1, 2, 3, 4


def seed_of(*key: int) -> int:
    """A 64-bit seed for `key`, non-negative integers below 2**32."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def generator(*key: int) -> torch.Generator:
    """A CPU generator for `key`.

    It lives on the CPU so that every device, and every number of devices, sees the same draws.
    """
    return torch.Generator().manual_seed(seed_of(*key))

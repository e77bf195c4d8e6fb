"""The dtype in which a convolution is computed."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast wants a convolution to run in; None where it has no say, as in float64."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64:
        return None
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None

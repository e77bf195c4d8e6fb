"""The dtype in which a convolution is computed."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast wants a convolution to run in; None where it has no say, as in float64."""
    if not torch._C._is_any_autocast_enabled():  # without naming a device, which takes longer
        return None
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64:
        return None
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None

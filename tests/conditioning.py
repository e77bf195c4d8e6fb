"""Weights with which rounding errors stay what algorithms make of them."""

from __future__ import annotations

import torch
from torch import nn


def well_conditioned(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm channels that are clearly on or clearly off, and blocks small steps.

    A ReLU's gradient jumps at zero: where a rounding error moves an input across it, one
    element's gradient is all error, in torch as here, and by chance. Shifts of six deviations,
    of one sign for a channel in all of a stage, leave only errors that algorithms make. Such
    shifts add up over the blocks until a mean hides its deviations, and then the rounding of one
    channel's mean decides, by chance again: so each block adds a tenth.
    """
    generator = torch.Generator().manual_seed(seed)
    block_ends = [getattr(m, "bn3", m.bn2) for m in model.modules() if hasattr(m, "bn2")]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            channels = module.num_features
            off = torch.arange(channels) % 4 == 3
            shift = 6 + torch.rand(channels, generator=generator)
            size = 0.1 if any(module is end for end in block_ends) else 1.0
            with torch.no_grad():
                module.weight.copy_(size * (0.5 + torch.rand(channels, generator=generator)))
                module.bias.copy_(torch.where(off, -shift, shift) * module.weight)
    return model

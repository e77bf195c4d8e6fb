"""A moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def _state(model: nn.Module) -> list[Tensor]:
    return [*(p.detach() for p in model.parameters()), *model.buffers()]


class MovingAverage:
    """A copy of a model whose parameters and running statistics are exponential moving averages.

    The decay after n steps is min(decay, (1 + n) / (10 + n)), so that a short run is not left with
    its first weights (TensorFlow's ExponentialMovingAverage with num_updates).

    Args:
        model: what is averaged; the copy in `module` has its device and memory layout.
        decay: of the average, a step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of `model` after a step."""
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        pairs = list(zip(_state(self.module), _state(model), strict=True))
        averages, values = zip(
            *(pair for pair in pairs if pair[0].is_floating_point()), strict=True
        )
        torch._foreach_lerp_(averages, values, weight)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)  # BatchNorm's count of batches
        self.steps += 1

"""The optimizer and the schedule of its learning rate, which moves once a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR

from fastres.train.config import TrainConfig


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.SGD:
    """SGD; without `decay_norm` the vectors (BatchNorm, biases) are a group of no weight decay."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not config.decay_norm:
        matrices = [p for p in parameters if p.ndim > 1]
        vectors = [p for p in parameters if p.ndim <= 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def make_scheduler(
    config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> LRScheduler:
    """The schedule of `config`; its `step` is to be called after every step of the optimizer."""
    if config.schedule == "step":
        return StepLR(optimizer, config.step_size * steps_per_epoch, config.gamma)
    total = config.epochs * steps_per_epoch
    warm = min(round(config.warmup * total), total - 1)
    cosine = config.schedule == "cosine"

    # A function, for a checkpoint takes the attributes of any other callable.
    def factor(step: int) -> float:
        return warm_up_and_fall(step, total=total, warm=warm, cosine=cosine)

    return LambdaLR(optimizer, factor)


def warm_up_and_fall(step: int, *, total: int, warm: int, cosine: bool) -> float:
    """The share of the highest learning rate that step `step` of `total` (0 is the first) takes.

    It rises evenly over the first `warm` steps, is 1 in the next, and falls, evenly or as half a
    cosine, so that it would be 0 in the step after the last.
    """
    if step < warm:
        return (step + 1) / (warm + 1)
    fallen = (step - warm) / (total - warm)
    return 0.5 * (1 + math.cos(math.pi * fallen)) if cosine else 1 - fallen

"""Fused and unfused training take the same steps from the same seed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

import fastres
from fastres import data, train
from fastres.models.resnet import BasicBlock
from fastres.train.seed import seed_everything

LAYOUTS = (torch.channels_last, torch.contiguous_format)


def models(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """torch's operations and ours, from the same weights."""
    seed_everything(0)
    plain = fastres.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10, stem="cifar").to(dtype)
    return plain, fastres.fuse_model(plain)


def losses(model: nn.Module, steps: int, layout: torch.memory_format = LAYOUTS[0]) -> Tensor:
    """Of the first steps of the standard recipe on 400 images of the sample, 8 pixels a side."""
    model = copy.deepcopy(model).to(memory_format=layout)
    part = data.sample().train[torch.arange(400)]
    small = avg_pool2d(part.images.float(), 4).byte().contiguous(memory_format=LAYOUTS[0])
    batches = data.Batches(
        data.ImageSet(small, part.labels), 16, (0.5,) * 3, (0.25,) * 3, augment=True, padding=1,
        channels_last=layout == LAYOUTS[0],
    )  # fmt: skip
    recipe = train.TrainConfig()
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
    )
    dtype = model.fc.weight.dtype
    found: list[float] = []
    for epoch in range(-(-steps // len(batches))):
        batches.set_epoch(epoch)
        for images, labels in batches:
            if len(found) < steps:
                meter = train.train_one_epoch(model, [(images.to(dtype), labels)], optimizer)
                found.append(meter.mean_loss)
    return torch.tensor(found, dtype=torch.float64)


def test_float64_agrees_to_rounding() -> None:
    plain, fused = (losses(model, 10) for model in models(torch.float64))
    torch.testing.assert_close(fused, plain, rtol=1e-11, atol=0)


def test_float32_parts_no_faster_than_torchs_own_layouts() -> None:
    """A rounding error that switches a ReLU grows to percents in a few steps, in torch as here."""
    plain, fused = models(torch.float32)
    expected = losses(plain, 50)
    ours, theirs = (
        ((other - expected).abs() / expected)
        for other in (losses(fused, 50), losses(plain, 50, LAYOUTS[1]))
    )
    assert ours[0] == pytest.approx(0, abs=1e-5)  # no step lies behind the first loss
    assert ours.mean() < 4 * theirs.mean()

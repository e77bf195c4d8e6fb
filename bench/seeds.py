"""Fused against unfused from several seeds: do the first steps agree, and is the end the same?

    python bench/seeds.py --json bench/results/seeds.json

For every seed a model is trained on the packaged sample without the fused operations, with them,
and, for the first steps, without them in torch's other memory layout. All three start from the same
weights and see the same batches: in exact arithmetic they would be equal. In float32 rounding sets
them apart, further with every step; how far torch's own two layouts part says how much of that is
rounding. Then the test accuracies of both forms are compared, seed by seed.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from harness import circumstances, write_json
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import fastres
from fastres.data import Batches, Dataset, sample
from fastres.train import TrainConfig, evaluate, train_one_epoch
from fastres.train.optim import make_optimizer, make_scheduler
from fastres.train.seed import seed_everything

PLAIN, FUSED, OTHER_LAYOUT = "plain", "fused", "plain, other layout"
FORMS: dict[str, dict[str, Any]] = {
    PLAIN: {"fused": False},
    FUSED: {"fused": True},
    OTHER_LAYOUT: {"fused": False, "channels_last": False},
}
FIRST_STEPS = 50
SPANS = ((1, 1), (2, 10), (11, 20), (21, 50))  # steps, both ends included
CONFIDENCE = 0.95


def batches(config: TrainConfig, dataset: Dataset, *, train: bool) -> Batches:
    """Of the training part, augmented, or of the test part."""
    return Batches(
        dataset.train if train else dataset.test,
        config.batch_size,
        dataset.mean,
        dataset.std,
        augment=train,
        seed=config.seed,
        channels_last=config.channels_last,
    )


def run(config: TrainConfig, dataset: Dataset, steps: int | None) -> tuple[nn.Module, list[float]]:
    """Train a model for `steps` steps, or for all of the config's epochs.

    Returns:
        The model, and the loss of every step.
    """
    seed_everything(config.seed)
    model = getattr(fastres, config.model)(
        fused=config.fused, stem="cifar", num_classes=len(dataset.classes)
    )
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    train = batches(config, dataset, train=True)
    optimizer = make_optimizer(config, model)
    scheduler = make_scheduler(config, optimizer, len(train))
    losses: list[float] = []
    for epoch in range(config.epochs):
        train.set_epoch(epoch)
        for batch in train:
            if len(losses) == steps:
                return model, losses
            meter = train_one_epoch(model, [batch], optimizer)
            scheduler.step()
            losses.append(meter.mean_loss)
    return model, losses


def gaps(losses: dict[str, list[float]]) -> dict[str, list[float]]:
    """How far the forms' losses are from the plain form's, relative to it, in every step."""
    plain = torch.tensor(losses[PLAIN][:FIRST_STEPS], dtype=torch.float64)
    found = {}
    for form in (FUSED, OTHER_LAYOUT):
        other = torch.tensor(losses[form][:FIRST_STEPS], dtype=torch.float64)
        found[form] = ((other - plain).abs() / plain).tolist()
    return found


def largest_gaps(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every span of steps the largest gap of all seeds, by form."""
    lines = []
    for first, last in SPANS:
        found = {
            form: [gap for one in runs for gap in one["gaps"][form][first - 1 : last]]
            for form in (FUSED, OTHER_LAYOUT)
        }
        if found[FUSED]:
            lines.append({"steps": [first, last], **{f: max(gap) for f, gap in found.items()}})
    return lines


def student_quantile(share: float, degrees: int) -> float:
    """Where the distribution function of Student's t reaches `share`, at least one half."""
    x = torch.linspace(0, 200, 2_000_001, dtype=torch.float64)
    density = torch.distributions.StudentT(torch.tensor(float(degrees), dtype=x.dtype))
    below = 0.5 + torch.cumulative_trapezoid(density.log_prob(x).exp(), x)
    return x[1 + int(torch.searchsorted(below, share))].item()


def compare(plain: Tensor, fused: Tensor) -> dict[str, float | bool]:
    """Both forms' accuracies by seed (float64, at least two): the paired t interval of the mean.

    The forms are called the same when 0 lies in the interval that holds the mean of the differences
    fused - plain with a probability of `CONFIDENCE`.
    """
    difference = fused - plain
    n = len(difference)
    half = student_quantile((1 + CONFIDENCE) / 2, n - 1) * (difference.std() / n**0.5).item()
    mean = difference.mean().item()
    return {
        "plain_mean": plain.mean().item(),
        "plain_deviation": plain.std().item(),
        "fused_mean": fused.mean().item(),
        "fused_deviation": fused.std().item(),
        "difference": mean,
        "interval_low": mean - half,
        "interval_high": mean + half,
        "same": abs(mean) <= half,
    }


def record(config: TrainConfig, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written and shown, of the seeds that are done."""
    accuracies = [
        torch.tensor([one["accuracy"][form] for one in runs], dtype=torch.float64)
        for form in (PLAIN, FUSED)
    ]
    settings = {
        name: getattr(config, name)
        for name in ("model", "epochs", "batch_size", "lr", "schedule", "warmup", "weight_decay")
    }
    return {
        "suite": "seeds",
        "case": f"{config.model}, sample, {config.epochs} epochs, batch {config.batch_size}",
        "settings": settings,
        "largest_gaps": largest_gaps(runs),
        "accuracy": compare(*accuracies) if len(runs) > 1 else None,
        "confidence": CONFIDENCE,
        "runs": runs,
        **circumstances("cpu"),
    }


def main() -> None:
    """Train everything, show how it compares and write the figures after every seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images", type=int, help="training and test images (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    config = TrainConfig(
        epochs=options.epochs, batch_size=options.batch_size, schedule="one-cycle", warmup=0.2
    )
    dataset = sample()
    if options.images:
        few = torch.arange(options.images)
        dataset = dataclasses.replace(dataset, train=dataset.train[few], test=dataset.test[few])
    runs: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for seed in track(range(options.seeds), "seeds", console=Console(stderr=True)):
        losses, accuracy = {}, {}
        for form, settings in FORMS.items():
            of_form = dataclasses.replace(config, seed=seed, **settings)
            steps = FIRST_STEPS if form == OTHER_LAYOUT else None
            model, losses[form] = run(of_form, dataset, steps)
            if steps is None:
                accuracy[form] = evaluate(model, batches(of_form, dataset, train=False)).accuracy
        runs.append({"seed": seed, "accuracy": accuracy, "gaps": gaps(losses), "losses": losses})
        found = record(config, runs)
        if options.json:
            write_json([found], options.json)
    Console().print({key: found[key] for key in ("case", "largest_gaps", "accuracy")})


if __name__ == "__main__":
    main()

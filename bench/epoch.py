"""One epoch of CIFAR-10, fused and not, from the same seed: do the loss curves agree, how fast?

    python bench/epoch.py --root DIR --json bench/results/cifar10-epoch.json

Both models start from the same weights and see the same batches; they take their steps in turn,
so that a noisy machine slows both alike. Then both are validated on the held-out fifth.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from harness import circumstances, median, write_json
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastres
from fastres.data import Batches, load, split
from fastres.train import TrainConfig, evaluate, train_one_epoch
from fastres.train.seed import seed_everything

FORMS = {"plain": False, "fused": True}


def race(config: TrainConfig, steps: int | None) -> dict[str, Any]:
    """Train both models side by side.

    Returns:
        For each form: "losses" and "seconds" of every step, "valid_loss" and "valid_accuracy".
    """
    dataset = load(config.data, config.root)
    train_index, valid_index = split(len(dataset.train), config.valid_ratio, config.seed)
    part = dataset.train[train_index]
    train = Batches(
        part, config.batch_size, dataset.mean, dataset.std, augment=True, seed=config.seed
    )
    valid = Batches(dataset.train[valid_index], config.batch_size, dataset.mean, dataset.std)

    contestants = {}
    for name, fused in FORMS.items():
        seed_everything(config.seed)
        model = getattr(fastres, config.model)(fused=fused, stem="cifar", num_classes=10)
        model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(
            model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        )
        contestants[name] = (model, optimizer)

    results: dict[str, Any] = {name: {"losses": [], "seconds": []} for name in FORMS}
    for step, batch in enumerate(track(train, "training", total=steps or len(train))):
        if step == steps:
            break
        for name, (model, optimizer) in contestants.items():
            meter = train_one_epoch(model, [batch], optimizer)
            results[name]["losses"].append(meter.mean_loss)
            results[name]["seconds"].append(meter.seconds)
    for name, (model, _) in contestants.items():
        meter = evaluate(model, valid)
        results[name] |= {"valid_loss": meter.mean_loss, "valid_accuracy": meter.accuracy}
    return results


def main() -> None:
    """Run the race, print its table and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("datasets"), help="of the official files")
    parser.add_argument("--data", choices=("cifar10", "sample"), default="cifar10")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="stop after so many (default: the epoch)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    config = TrainConfig(
        data=arguments.data,
        root=arguments.root,
        model=arguments.model,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    results = race(config, arguments.steps)

    table = Table(title=f"{config.model}, {config.data}, batch {config.batch_size}")
    for column in ("", "images/s", "mean loss", "last 20 steps", "valid. loss", "valid. accuracy"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        losses = torch.tensor(result["losses"])
        result["images_per_second"] = config.batch_size / median(result["seconds"])
        table.add_row(
            name,
            f"{result['images_per_second']:.1f}",
            f"{losses.mean():.4f}",
            f"{losses[-20:].mean():.4f}",
            f"{result['valid_loss']:.4f}",
            f"{result['valid_accuracy']:.2%}",
        )
    Console().print(table)
    plain, fused = (torch.tensor(results[name]["losses"]) for name in FORMS)
    gap = (fused - plain).abs()
    agreement = {
        "first_10_steps_largest_gap": gap[:10].max().item(),
        "median_gap": gap.median().item(),
        "largest_gap": gap.max().item(),
        "gap_of_mean_losses": (fused.mean() - plain.mean()).item(),
    }
    Console().print({key: f"{value:.2e}" for key, value in agreement.items()})
    if arguments.json:
        case = f"{config.model}, {config.data}, batch {config.batch_size}, lr {config.lr}"
        settings = {
            key: str(value)
            for key, value in dataclasses.asdict(config).items()
            if key not in ("root", "out", "resume")
        }
        record = {
            "suite": "epoch",
            "case": case,
            "settings": settings,
            "agreement": agreement,
            "forms": results,
            **circumstances("cpu"),
        }
        write_json([record], arguments.json)


if __name__ == "__main__":
    main()

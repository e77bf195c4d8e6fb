"""Runs that take milliseconds: a model of a few hundred weights and 100 training images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastres import train
from fastres.train import checkpoint
from fastres.train import run as run_state

TINY = """
import torch
from torch import nn
from fastres import data

def build_model(name, arguments):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, arguments["num_classes"]),
    )

torch.set_num_threads(1)  # so little work is only slowed down by a second thread
whole = data.sample()

def load(name, root):
    return data.Dataset(whole.train[torch.arange(100)], whole.test[torch.arange(40)])
"""
TINY_NAMES: dict[str, Any] = {}
exec(TINY, TINY_NAMES)
FEW_EPOCHS = {"epochs": 3, "batch_size": 16, "device": "cpu"}
TIMES = ("images_per_second", "seconds")


def use_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a few hundred weights and 100 training images: an epoch takes milliseconds."""
    for module in ("run", "inference"):
        monkeypatch.setattr(f"fastres.train.{module}.build_model", TINY_NAMES["build_model"])
    for module in ("loop", "inference"):
        monkeypatch.setattr(f"fastres.train.{module}.load", TINY_NAMES["load"])


def fit(out: Path, **changes: Any) -> train.Result:
    return train.fit(train.TrainConfig(out=out, **{**FEW_EPOCHS, **changes}), progress=False)


def last(out: Path) -> dict[str, Any]:
    return checkpoint.load(out / "last.pt", run_state.RUN_KEYS)


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in history]


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_end(one: Path, other: Path) -> None:
    """Both runs came to the same weights, optimizer, best epoch and metrics, bit for bit."""
    for name, keys in (("last.pt", run_state.RUN_KEYS), ("best.pt", run_state.MODEL_KEYS)):
        a, b = (checkpoint.load(out / name, keys) for out in (one, other))
        assert a["epoch"] == b["epoch"]
        for key, value in a["model"].items():
            assert torch.equal(value, b["model"][key]), key
    a, b = last(one), last(other)
    for a_average, b_average in [(a["averaging"], b["averaging"])]:
        assert (a_average is None) == (b_average is None)
        if a_average:
            assert a_average["steps"] == b_average["steps"]
            for key, value in a_average["trained"].items():
                assert torch.equal(value, b_average["trained"][key]), key
    for index, moments in a["optimizer"]["state"].items():
        buffer = b["optimizer"]["state"][index]["momentum_buffer"]
        assert torch.equal(moments["momentum_buffer"], buffer)
    assert a["early_stopping"] == b["early_stopping"]
    assert a["scheduler"] == b["scheduler"]
    assert torch.equal(a["random"]["torch"], b["random"]["torch"])
    assert timeless(metrics(one)) == timeless(metrics(other))
    results = [json.loads((out / "result.json").read_text()) for out in (one, other)]
    assert results[0]["test_accuracy"] == results[1]["test_accuracy"]
    assert results[0]["test_loss"] == results[1]["test_loss"]

"""The recipes, and each of their parts against its definition."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres import data, train
from fastres.train import checkpoint, config
from fastres.train import run as run_state
from fastres.train.ema import MovingAverage
from fastres.train.optim import make_optimizer, make_scheduler


def small_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model and 100 training images in the places of the real ones."""
    whole = data.sample()
    few = data.Dataset(whole.train[torch.arange(100)], whole.test[torch.arange(40)])
    for module in ("run", "inference"):
        monkeypatch.setattr(f"fastres.train.{module}.build_model", lambda *_: small_model())
    for module in ("loop", "inference"):
        monkeypatch.setattr(f"fastres.train.{module}.load", lambda *_: few)


def rates(settings: train.TrainConfig, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step."""
    optimizer = make_optimizer(settings, nn.Linear(1, 1))
    scheduler = make_scheduler(settings, optimizer, steps_per_epoch)
    result = []
    for _ in range(settings.epochs * steps_per_epoch):
        optimizer.step()
        result.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return result


class TestRecipe:
    def test_standard_is_what_it_always_was(self) -> None:
        """Version 1, number by number: whoever changes one must say so here and in the version."""
        standard = train.RECIPES["standard"]
        expected = {
            "recipe": "standard", "recipe_version": 1, "model": "resnet18", "epochs": 100,
            "batch_size": 128, "lr": 0.02, "schedule": "step", "warmup": 0.0, "step_size": 30,
            "gamma": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4,
            "decay_norm": True, "label_smoothing": 0.0, "flip": "random", "cutout": 0, "ema": 0.0,
            "seed": 0, "valid_ratio": 0.2, "patience": 30, "amp": "none", "channels_last": True,
        }  # fmt: skip
        assert {name: getattr(standard, name) for name in expected} == expected
        rest = {field.name for field in dataclasses.fields(standard)} - expected.keys()
        assert rest == {  # what is trained on, on what, and where to
            "data", "root", "test_ratio", "image_size", "stem", "weights", "freeze", "workers",
            "device", "fused", "out", "resume", "tensorboard", "sync_bn",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("name", "short"),
        [
            ("best", {}),
            (
                "best-short",
                {
                    "recipe_version": 4,
                    "epochs": 36,
                    "batch_size": 128,
                    "lr": 0.25,
                    "flip": "alternating",
                    "ema": 0.995,
                },
            ),
        ],
    )
    def test_best_is_what_its_version_says(self, name: Any, short: dict[str, Any]) -> None:
        """All that differs from version 1 of the standard recipe."""
        expected = {
            "recipe": name, "recipe_version": 1, "epochs": 40, "batch_size": 512, "lr": 0.4,
            "schedule": "one-cycle", "warmup": 0.2, "nesterov": True, "decay_norm": False,
            "label_smoothing": 0.1, "cutout": 8, "ema": 0.998, "valid_ratio": 0.02,
            "patience": 1000, "amp": "auto", **short,
        }  # fmt: skip
        assert train.RECIPES[name] == dataclasses.replace(train.RECIPES["standard"], **expected)

    def test_names_are_those_of_the_settings(self) -> None:
        assert set(train.RECIPES) == set(config.RecipeName.__args__)  # type: ignore[attr-defined]
        for name, settings in train.RECIPES.items():
            assert settings.recipe == name

    def test_overrides_and_errors(self) -> None:
        assert train.recipe("best", lr=0.1) == dataclasses.replace(train.RECIPES["best"], lr=0.1)
        with pytest.raises(train.ConfigError, match="recipe is 'worst', expected standard or best"):
            train.recipe("worst")  # type: ignore[arg-type]
        with pytest.raises(train.ConfigError, match=r"recipe best: .*'speed'"):
            train.recipe("best", speed=1)
        with pytest.raises(train.ConfigError, match=r"^lr is -1"):
            train.recipe("best", lr=-1)

    @pytest.mark.parametrize("name", ["best", "best-short"])
    def test_run_learns_and_stores_name_and_version(
        self, name: Any, small: None, tmp_path: Path
    ) -> None:
        torch.set_num_threads(1)
        settings = train.recipe(
            name, epochs=6, batch_size=16, lr=0.05, valid_ratio=0.2, device="cpu", out=tmp_path
        )
        result = train.fit(settings, progress=False)
        assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
        stored = json.loads((tmp_path / "config.json").read_text())
        version = train.RECIPES[name].recipe_version
        assert (stored["recipe"], stored["recipe_version"]) == (name, version)
        assert stored == config.to_dict(settings)

    def test_tests_once_what_was_kept(
        self, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With an average it is the average that is validated, kept, tested and loaded again."""
        passes: list[int] = []
        real = data.Batches.iterate

        def iterate(self: data.Batches, first: int = 0) -> Any:
            passes.append(len(self.part))
            return real(self, first)

        monkeypatch.setattr(data.Batches, "iterate", iterate)
        settings = train.recipe(
            "best", epochs=2, batch_size=16, valid_ratio=0.2, device="cpu", out=tmp_path
        )
        result = train.fit(settings, progress=False)
        assert passes == [80, 20, 80, 20, 40]
        last = checkpoint.load(tmp_path / "last.pt", run_state.RUN_KEYS)
        trained = last["averaging"]["trained"]
        assert last["averaging"]["steps"] == 10
        assert not torch.equal(trained["0.weight"], last["model"]["0.weight"])
        model, _ = train.load_model(tmp_path / "best.pt")
        if result.best_epoch == 2:
            assert torch.equal(model.state_dict()["0.weight"], last["model"]["0.weight"])
        again = train.evaluate_checkpoint(
            train.EvalConfig(tmp_path / "best.pt", batch_size=16, device="cpu")
        )[1]
        assert again.accuracy == result.test_accuracy

    def test_longer_schedule_is_no_resume(self, small: None, tmp_path: Path) -> None:
        settings = train.recipe("best", epochs=1, device="cpu", valid_ratio=0.2, out=tmp_path)
        train.fit(settings, progress=False)
        longer = dataclasses.replace(settings, epochs=2, resume=True)
        with pytest.raises(train.RunFolderError, match=r"epochs \(was 1, is 2\)"):
            train.fit(longer, progress=False)


class TestSchedule:
    def test_step_is_torchs(self) -> None:
        settings = train.TrainConfig(epochs=7, step_size=2, lr=0.3, gamma=0.1)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
        expected = []
        for _ in range(7):
            optimizer.step()
            expected += [optimizer.param_groups[0]["lr"]] * 3
            scheduler.step()
        assert rates(settings, 3) == expected

    def test_one_cycle_is_straight_up_and_down(self) -> None:
        settings = train.TrainConfig(epochs=5, lr=2.0, schedule="one-cycle", warmup=0.2)
        expected = [2 * i / 3 for i in (1, 2)] + [2 * (1 - i / 8) for i in range(8)]
        assert rates(settings, 2) == pytest.approx(expected)

    def test_cosine_is_torchs(self) -> None:
        settings = train.TrainConfig(epochs=9, lr=0.5, schedule="cosine")
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        expected = []
        for _ in range(9):
            optimizer.step()
            expected.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        assert rates(settings, 1) == pytest.approx(expected)

    @pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
    @pytest.mark.parametrize(("epochs", "steps", "warmup"), [(1, 1, 0.9), (1, 5, 0.2), (3, 2, 0.0)])
    def test_every_rate_is_above_zero_and_one_is_the_highest(
        self, schedule: Any, epochs: int, steps: int, warmup: float
    ) -> None:
        settings = train.TrainConfig(epochs=epochs, lr=0.7, schedule=schedule, warmup=warmup)
        found = rates(settings, steps)
        assert min(found) > 0
        assert max(found) == 0.7
        peak = found.index(0.7)
        assert found[: peak + 1] == sorted(found[: peak + 1])
        assert found[peak:] == sorted(found[peak:], reverse=True)


class TestOptimizer:
    def test_no_decay_of_vectors(self) -> None:
        model = small_model()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = make_optimizer(
            train.TrainConfig(lr=1.0, weight_decay=0.5, decay_norm=False), model
        )
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for old, new in zip(before, model.parameters(), strict=True):
            assert torch.equal(new, old if new.ndim == 1 else old / 2)

    def test_standard_decays_everything(self) -> None:
        groups = make_optimizer(train.TrainConfig(), small_model()).param_groups
        assert [(g["weight_decay"], g["nesterov"], len(g["params"])) for g in groups] == [
            (5e-4, False, 6)
        ]


def test_moving_average_is_its_definition() -> None:
    model = small_model()
    average = MovingAverage(model, 0.25)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    for decay in (0.1, 2 / 11, 0.25, 0.25):
        model(torch.randn(4, 3, 32, 32))  # moves BatchNorm's statistics
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
        average.update(model)
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                expected[key] = decay * expected[key] + (1 - decay) * value
            else:
                expected[key] = value.clone()
    assert average.steps == 4
    for key, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[key])
    assert not any(p.requires_grad for p in average.module.parameters())


def test_label_smoothing_is_in_training_alone(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    real = F.cross_entropy

    def cross_entropy(*args: Any, label_smoothing: float = 0.0, **options: Any) -> torch.Tensor:
        if not options:  # the mean losses, and not those of single test images
            seen.append(label_smoothing)
        return real(*args, label_smoothing=label_smoothing, **options)

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    settings = train.TrainConfig(
        epochs=1, batch_size=40, label_smoothing=0.3, device="cpu", out=tmp_path
    )
    train.fit(settings, progress=False)
    assert seen == [0.3, 0.3, 0.0, 0.0]  # 80 for training, 20 for validation, 40 for the test


def test_layout_does_not_change_the_answers(small: None, tmp_path: Path) -> None:
    """A switch of memory layout alone: the same losses but for rounding."""
    losses = []
    for channels_last in (True, False):
        settings = train.TrainConfig(
            epochs=2, batch_size=16, device="cpu", channels_last=channels_last,
            out=tmp_path / str(channels_last),
        )  # fmt: skip
        losses.append([e["train_loss"] for e in train.fit(settings, progress=False).history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert all(math.isfinite(loss) for loss in losses[0])

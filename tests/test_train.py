"""Training: the recipe, the run's folder, and runs that are killed and resumed bit for bit."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastres
from fastres import data, train
from fastres.train import checkpoint, config, loop, seed
from fastres.train import run as run_state
from fastres.train.early_stopping import EarlyStopping
from fastres.train.files import write_atomically
from fastres.train.model import resolve_amp
from tiny_runs import FEW_EPOCHS, TINY_NAMES, assert_same_end, fit, last, metrics, use_tiny


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny(monkeypatch)


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value", "expectation"),
        [
            ("model", "vgg", "resnet18 or resnet34"),
            ("data", "mnist", "sample or cifar10"),
            ("amp", "fp8", "none or bf16 or fp16 or auto"),
            ("recipe", "worst", "standard or best or best-short"),
            ("schedule", "poly", "step or cosine or one-cycle"),
            ("epochs", 0, "a whole number, at least 1"),
            ("batch_size", 2.5, "a whole number, at least 1"),
            ("step_size", -1, "a whole number, at least 1"),
            ("patience", True, "a whole number, at least 1"),
            ("seed", -1, "a whole number, at least 0"),
            ("seed", 2**32, "below 2\\*\\*32"),
            ("lr", 0.0, "a number above 0"),
            ("lr", float("nan"), "a number above 0"),
            ("momentum", 1.0, "a number in \\[0, 1\\)"),
            ("weight_decay", -1e-4, "at least 0"),
            ("gamma", 0.0, "a number in \\(0, 1\\]"),
            ("valid_ratio", 0.0, "a number in \\(0, 1\\)"),
            ("label_smoothing", 1.0, "a number in \\[0, 1\\)"),
            ("ema", -0.1, "a number in \\[0, 1\\)"),
            ("warmup", 0.2, "0 with the step schedule"),
            ("flip", "often", "random or alternating"),
            ("cutout", 1.5, "a whole number, at least 0"),
            ("resume", True, "--out DIR"),
        ],
    )
    def test_names_field_value_and_expectation(
        self, field: str, value: object, expectation: str
    ) -> None:
        with pytest.raises(train.ConfigError, match=f"^{field} is .*, expected .*{expectation}"):
            train.TrainConfig(**{field: value})  # type: ignore[arg-type]

    def test_is_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            train.TrainConfig().lr = 1.0  # type: ignore[misc]

    def test_json_and_back(self) -> None:
        before = train.TrainConfig(lr=0.3, out=Path("a"), root=Path("b"), fused=False)
        assert config.from_dict(json.loads(json.dumps(config.to_dict(before)))) == before
        with pytest.raises(train.ConfigError, match="unknown settings speed"):
            config.from_dict({"speed": 1})

    @pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta"])
    def test_device_that_is_not_there(self, device: str, tmp_path: Path) -> None:
        with pytest.raises(train.ConfigError, match=f"device is '{device}'"):
            fit(tmp_path / "run", device=device)
        assert not (tmp_path / "run").exists()


class TestSeed:
    def test_states_go_through_a_checkpoint(self, tmp_path: Path) -> None:
        import random

        def draws() -> list[float]:
            return [random.random(), float(np.random.rand()), float(torch.rand(()))]

        seed.seed_everything(7)
        np.random.standard_normal()  # leaves a cached second draw in the state
        checkpoint.save(tmp_path / "a.pt", {"random": seed.random_state()})
        expected = draws()
        seed.seed_everything(8)
        assert draws() != expected
        seed.set_random_state(checkpoint.load(tmp_path / "a.pt", frozenset({"random"}))["random"])
        assert draws() == expected

    def test_same_seed_same_numbers(self, tmp_path: Path) -> None:
        fit(tmp_path / "a", seed=4)
        torch.rand(5)
        fit(tmp_path / "b", seed=4)
        assert_same_end(tmp_path / "a", tmp_path / "b")

    def test_other_seed_other_numbers(self, tmp_path: Path) -> None:
        one, other = (fit(tmp_path / str(s), seed=s, epochs=1) for s in (4, 5))
        assert one.history[0]["train_loss"] != other.history[0]["train_loss"]


class TestEarlyStopping:
    def test_stops_after_patience_and_keeps_the_first_best(self) -> None:
        stopping = EarlyStopping(patience=2)
        assert [stopping.update(i + 1, a) for i, a in enumerate((0.1, 0.4, 0.4))] == [
            True,
            True,
            False,
        ]
        assert not stopping.should_stop
        stopping.update(4, 0.3)
        assert stopping.should_stop
        assert (stopping.best_epoch, stopping.best_accuracy) == (2, 0.4)

    def test_best_epoch_is_restored(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The accuracy falls after epoch 2: the run stops, and it is epoch 2 that is tested."""
        epochs: list[dict[str, torch.Tensor]] = []
        tested: list[dict[str, torch.Tensor]] = []
        real = loop.evaluate

        def evaluate(model: nn.Module, batches: data.Batches, **options: Any) -> train.Meter:
            meter = real(model, batches, **options)
            weights = {k: v.clone() for k, v in model.state_dict().items()}
            if len(batches.part) == 40:
                tested.append(weights)
            else:
                epochs.append(weights)
                meter.correct = [4, 9, 5, 3, 9][len(epochs) - 1]
            return meter

        monkeypatch.setattr(loop, "evaluate", evaluate)
        result = fit(tmp_path / "run", epochs=10, patience=3)
        assert (result.epochs, result.best_epoch, result.ended_by) == (5, 2, "early stopping")
        assert result.valid_accuracy == 9 / 20
        assert len(tested) == 1
        for key, value in tested[0].items():
            assert torch.equal(value, epochs[1][key])
            assert torch.equal(
                value, train.load_model(tmp_path / "run" / "best.pt")[0].state_dict()[key]
            )


class TestFit:
    def test_run_folder(self, tmp_path: Path) -> None:
        out = tmp_path / "run"
        result = fit(out, step_size=2, lr=0.1)
        names = """
            best.pt config.json confusion.png curves.png last.previous.pt last.pt metrics.csv
            metrics.jsonl result.json test.json wrongest.png
        """
        assert sorted(path.name for path in out.iterdir()) == names.split()
        assert json.loads((out / "config.json").read_text())["step_size"] == 2
        lines = metrics(out)
        assert lines == result.history
        assert [line["epoch"] for line in lines] == [1, 2, 3]
        assert [line["lr"] for line in lines] == pytest.approx([0.1, 0.1, 0.01])
        assert set(lines[0]) == {
            "epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "lr",
            "images_per_second", "seconds",
        }  # fmt: skip
        with Image.open(out / "curves.png") as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
        saved = json.loads((out / "result.json").read_text())
        assert saved["test_accuracy"] == result.test_accuracy
        assert 0 <= result.test_accuracy <= 1

    def test_learns(self, tmp_path: Path) -> None:
        result = fit(tmp_path / "run", epochs=8)
        assert result.history[-1]["train_loss"] < 0.9 * result.history[0]["train_loss"]

    def test_default_folder_names_data_model_and_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        result = train.fit(train.TrainConfig(**{**FEW_EPOCHS, "epochs": 1}), progress=False)
        assert result.folder.parent == Path("runs")
        assert result.folder.name.startswith("sample-resnet18-2")

    def test_only_the_training_part_is_augmented_and_test_comes_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[data.Batches] = []
        passes: list[int] = []

        class Spy(data.Batches):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                made.append(self)

            def iterate(self, first: int = 0) -> Any:
                passes.append(len(self.part))
                return super().iterate(first)

        monkeypatch.setattr(loop, "Batches", Spy)
        fit(tmp_path / "run")
        assert [(len(b.part), b.augment) for b in made] == [(80, True), (20, False), (40, False)]
        assert passes == [80, 20, 80, 20, 80, 20, 40]

    def test_folder_in_use_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "precious.txt").write_text("mine")
        with pytest.raises(train.RunFolderError, match=f"{tmp_path} is not empty"):
            fit(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]

    @pytest.mark.parametrize(
        ("device", "capability", "expected"),
        [
            ("cpu", "avx512", None),
            ("cpu", "amx", torch.bfloat16),
            ("cuda", "avx512", torch.bfloat16),
        ],
    )
    def test_amp_auto_is_bfloat16_where_it_is_fast(
        self,
        device: str,
        capability: str,
        expected: torch.dtype | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(fastres._C, "cpu_capability", lambda: capability)
        assert resolve_amp("auto", torch.device(device)) == expected
        assert resolve_amp("none", torch.device(device)) is None

    @pytest.mark.parametrize("amp", ["bf16", "fp16"])
    def test_amp(self, amp: str, tmp_path: Path) -> None:
        result = fit(tmp_path / "run", amp=amp)
        weights = last(tmp_path / "run")["model"]
        assert weights["0.weight"].dtype == torch.float32
        assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]

    def test_nan_loss_names_epoch_and_step(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = data.Batches.iterate

        def iterate(self: data.Batches, first: int = 0) -> Any:
            for step, (images, labels) in enumerate(real(self, first), start=1):
                spoilt = self.augment and self.epoch == 1 and step == 3
                yield (images * float("nan") if spoilt else images), labels

        monkeypatch.setattr(data.Batches, "iterate", iterate)
        said = "epoch 2: the loss is nan at step 3: .*; .*best.pt keeps epoch 1, the best so far"
        with pytest.raises(train.NonFiniteLossError, match=said):
            fit(tmp_path / "run")
        assert last(tmp_path / "run")["epoch"] == 1
        best = checkpoint.load(tmp_path / "run" / "best.pt", run_state.MODEL_KEYS)
        assert best["epoch"] == 1
        assert all(value.isfinite().all() for value in best["model"].values())

    def test_parts_can_be_used_apart(self) -> None:
        sample = data.sample()
        batches = data.Batches(sample.train[torch.arange(32)], 8, sample.mean, sample.std)
        model = run_state.build_model("resnet18", {"num_classes": 10})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        first = train.train_one_epoch(model, batches, optimizer)
        for _ in range(4):
            train.train_one_epoch(model, batches, optimizer)
        after = train.evaluate(model, batches)
        assert (first.step, first.images) == (4, 32)
        assert after.mean_loss < first.mean_loss
        assert not model.training


class TestCheckpoint:
    def test_holds_all_that_a_run_is(self, tmp_path: Path) -> None:
        out = tmp_path / "run"
        settings: dict[str, Any] = {"ema": 0.9, "nesterov": True, "schedule": "cosine", "seed": 3}
        fit(out, **settings)
        content = last(out)
        assert content["version"] == fastres.__version__
        assert (content["epoch"], content["averaging"]["steps"]) == (3, 15)
        assert content["averaging"]["trained"].keys() == content["model"].keys()
        assert len(content["optimizer"]["state"]) == 5
        assert content["scheduler"]["last_epoch"] == 15
        assert content["early_stopping"]["best_epoch"] >= 1
        assert {"python", "numpy", "torch", "cuda"} == content["random"].keys()
        made = train.TrainConfig(out=out, **{**FEW_EPOCHS, **settings})
        assert config.from_dict(content["config"]) == made

    def test_old_file_stays_when_writing_fails(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        checkpoint.save(path, {"x": 1})

        def fail(file: Any) -> None:
            file.write(b"half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, fail)
        assert checkpoint.load(path, frozenset({"x"}))["x"] == 1

    def test_reaches_the_disk_before_it_takes_the_old_ones_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done: list[str] = []
        fsync, replace = os.fsync, os.replace

        def noted_fsync(number: int) -> None:
            done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{number}')).name}")
            fsync(number)

        def noted_replace(source: Path, target: Path) -> None:
            done.append(f"{source.name} -> {target.name}")
            replace(source, target)

        checkpoint.save(tmp_path / "a.pt", {"x": 1})
        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(os, "replace", noted_replace)
        checkpoint.save(tmp_path / "a.pt", {"x": 2})
        assert done == [
            "sync .a.pt.tmp",
            "a.pt -> a.previous.pt",
            ".a.pt.tmp -> a.pt",
            f"sync {tmp_path.name}",
        ]

    def test_no_code_is_run_from_a_file(self, tmp_path: Path) -> None:
        torch.save({"format": 1, "x": os.system}, tmp_path / "evil.pt")
        with pytest.raises(train.CheckpointError, match=r"evil\.pt is damaged or no checkpoint"):
            checkpoint.load(tmp_path / "evil.pt", frozenset())

    @pytest.mark.parametrize("damage", ["cut", "empty", "text", "other", "flipped", "one byte"])
    def test_damaged_file_is_named(self, damage: str, tmp_path: Path) -> None:
        out = tmp_path / "run"
        fit(out, epochs=1)
        path = out / "last.pt"
        whole = path.read_bytes()
        weight = last(out)["model"]["5.weight"].numpy().tobytes()
        assert weight in whole
        if damage == "other":
            torch.save(torch.zeros(3), path)
        else:
            middle = len(whole) // 2
            path.write_bytes(
                {
                    "cut": whole[:middle],
                    "empty": b"",
                    "text": b"hello",
                    "flipped": whole[:middle] + bytes(255 - b for b in whole[middle:]),
                    "one byte": whole.replace(weight, bytes([weight[0] ^ 1]) + weight[1:]),
                }[damage]
            )
        with pytest.raises(train.CheckpointError, match=r"last\.pt is "):
            fit(out, resume=True)

    def test_missing_keys_are_named(self, tmp_path: Path) -> None:
        fit(tmp_path / "run", epochs=1)
        with pytest.raises(train.CheckpointError, match=r"best\.pt lacks averaging, config"):
            checkpoint.load(tmp_path / "run" / "best.pt", run_state.RUN_KEYS)


class TestPredict:
    @pytest.fixture
    def best(self, tmp_path: Path) -> Path:
        return fit(tmp_path / "run", epochs=1).best_checkpoint

    def test_probabilities(self, best: Path, tmp_path: Path) -> None:
        for name, mode, size in (("a.png", "RGB", (32, 32)), ("b.jpg", "L", (90, 50))):
            Image.new(mode, size, 100).save(tmp_path / name)
        Image.new("RGBA", (7, 40), (1, 2, 3, 4)).save(tmp_path / "c.webp")
        paths = tuple(tmp_path / name for name in ("a.png", "b.jpg", "c.webp"))
        predictions = train.predict(train.PredictConfig(paths, best, top=10))
        assert [p.image for p in predictions] == list(paths)
        for prediction in predictions:
            names, shares = zip(*prediction.classes, strict=True)
            assert set(names) == set(data.sample().classes)
            assert sum(shares) == pytest.approx(1, abs=1e-5)
            assert list(shares) == sorted(shares, reverse=True)

    def test_is_what_the_model_says_of_the_pixels(self, best: Path, tmp_path: Path) -> None:
        sample = data.sample()
        pixels = sample.test.images[3]
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
        (prediction,) = train.predict(train.PredictConfig((tmp_path / "x.png",), best, top=1))
        model, _ = train.load_model(best)
        with torch.inference_mode():
            logits = model(data.normalize(pixels[None], sample.mean, sample.std))
        name, share = prediction.classes[0]
        assert name == sample.classes[int(logits.argmax())]
        assert share == pytest.approx(float(logits.softmax(1).max()), abs=1e-6)

    def test_unreadable_files_are_named(self, best: Path, tmp_path: Path) -> None:
        (tmp_path / "text.png").write_text("no picture")
        Image.new("RGB", (64, 64), 9).save(tmp_path / "cut.png")
        cut = (tmp_path / "cut.png").read_bytes()
        (tmp_path / "cut.png").write_bytes(cut[: len(cut) // 2])
        for name, reason in (
            ("text.png", "cannot read .*text.png: not an image"),
            ("cut.png", "cannot read .*cut.png"),
            ("none.png", "no image at .*none.png"),
        ):
            with pytest.raises(train.ImageError, match=reason):
                train.predict(train.PredictConfig((tmp_path / name,), best))

    def test_every_unreadable_file_is_named_at_once(self, best: Path, tmp_path: Path) -> None:
        folder = tmp_path / "pictures"
        folder.mkdir()
        for number in range(9):
            Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
        for number in (0, 2, 4, 5, 7, 8):
            (folder / f"{number}.png").write_text("no picture")
        with pytest.raises(train.ImageError) as error:
            train.predict(train.PredictConfig((folder,), best, batch_size=2))
        named = [f"cannot read the image {folder}/{n}.png: not an image" for n in (0, 2, 4, 5, 7)]
        assert str(error.value) == "; ".join([*named, "and 1 more"])

    def test_folder_without_an_image_is_named(self, best: Path, tmp_path: Path) -> None:
        (tmp_path / "empty" / "within").mkdir(parents=True)
        with pytest.raises(train.ImageError, match=f"no image in the folder {tmp_path}/empty: exp"):
            train.predict(train.PredictConfig((tmp_path / "empty",), best))

    def test_eval_gives_the_runs_test_numbers(self, tmp_path: Path) -> None:
        result = fit(tmp_path / "run")
        name, meter, outcomes = train.evaluate_checkpoint(
            train.EvalConfig(result.best_checkpoint, batch_size=16)
        )
        assert name == "sample"
        assert (meter.accuracy, meter.images) == (result.test_accuracy, 40)
        assert meter.mean_loss == pytest.approx(result.test_loss)
        assert sum(line.correct for line in outcomes.per_class()) == meter.correct
        assert outcomes.labels.tolist() == TINY_NAMES["load"]("sample", "").test.labels.tolist()
        assert float(outcomes.losses.mean()) == pytest.approx(meter.mean_loss)

    def test_eval_refuses_other_classes(self, best: Path) -> None:
        content = checkpoint.load(best, run_state.MODEL_KEYS)
        checkpoint.save(best, {**content, "classes": ["cat"] * 10})
        with pytest.raises(data.DataError, match="sample has other classes than"):
            train.evaluate_checkpoint(train.EvalConfig(best))

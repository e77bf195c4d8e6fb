"""What a run leaves to look at: the table of metrics, TensorBoard, confusion and worst images."""

import base64
import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastres import data, train
from fastres.data import ImageSet, PictureSet
from fastres.train.mistakes import LARGEST_THUMBNAIL, MOST_WRONG, draw_confusion, write_mistakes
from fastres.train.outcomes import Outcomes
from fastres.train.run_folder import RunFolder


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear model and a hundred images."""
    whole = data.sample()
    few = data.Dataset(whole.train[torch.arange(60)], whole.test[torch.arange(40)])
    monkeypatch.setattr("fastres.train.loop.load", lambda name, root: few)
    monkeypatch.setattr(
        "fastres.train.run.build_model",
        lambda name, arguments: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)),
    )


def fit(out: Path, **settings: Any) -> train.Result:
    settings = {"epochs": 2, "batch_size": 20, "device": "cpu", "out": out, **settings}
    return train.fit(train.TrainConfig(**settings), progress=False)


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_csv_has_the_same_numbers(tmp_path: Path) -> None:
    result = fit(tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in line.items()} for line in lines] == result.history


def test_test_json_and_pictures(tmp_path: Path) -> None:
    result = fit(tmp_path / "run")
    content = json.loads((tmp_path / "run" / "test.json").read_text())
    sample = data.sample()
    assert content["classes"] == list(sample.classes)
    confusion = torch.tensor(content["confusion"])
    assert confusion.sum(1).tolist() == [4] * 10
    assert int(confusion.diag().sum()) / 40 == pytest.approx(result.test_accuracy)
    wrongest = content["wrongest"]
    assert len(wrongest) == min(MOST_WRONG, 40 - int(confusion.diag().sum()))
    losses = [mistake["loss"] for mistake in wrongest]
    assert losses == sorted(losses, reverse=True)
    for mistake in wrongest:
        position = int(mistake["image"].removeprefix("test "))
        assert mistake["label"] == sample.classes[int(sample.test.labels[position])]
        assert mistake["label"] != mistake["predicted"]
        pixels = np.asarray(picture(mistake["png"]))
        assert np.array_equal(pixels, sample.test.images[position].permute(1, 2, 0))
    for name in ("confusion.png", "wrongest.png"):
        with Image.open(tmp_path / "run" / name) as shown:
            assert shown.format == "PNG"
            assert min(shown.size) > 300


@pytest.mark.parametrize("classes", [2, 21, 120])
def test_confusion_of_few_and_many_classes(classes: int, tmp_path: Path) -> None:
    confusion = torch.eye(classes, dtype=torch.int64)
    names = tuple(f"class {number}" for number in range(classes))
    draw_confusion(tmp_path / "c.png", confusion, names)
    with Image.open(tmp_path / "c.png") as shown:
        red = np.asarray(shown.convert("RGB"))[..., 0]
    assert int((red < 30).sum()) > 100  # the diagonal


def test_own_pictures_and_long_names(tmp_path: Path) -> None:
    classes = ("a class with a name that is much too long for a picture", "ш")
    paths = []
    for number in range(3):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (400, 300), (9 * number, 0, 0)).save(paths[-1])
    outcomes = Outcomes(classes)
    outcomes.add(torch.tensor([[0.0, 1.0], [0.0, 3.0], [2.0, 0.0]]), torch.zeros(3).long())
    folder = RunFolder(tmp_path)
    write_mistakes(folder, outcomes, PictureSet(tuple(paths), torch.zeros(3).long()), 224)
    first, second = json.loads(folder.test.read_text())["wrongest"]
    assert (first["image"], second["image"]) == (paths[1], paths[0])
    assert first["predicted"] == "ш"
    shown = picture(first["png"])
    assert shown.size == (LARGEST_THUMBNAIL, LARGEST_THUMBNAIL)
    assert shown.getpixel((5, 5)) == (9, 0, 0)


def test_nothing_wrong(tmp_path: Path) -> None:
    outcomes = Outcomes(("a", "b"))
    outcomes.add(torch.eye(2), torch.arange(2))
    part = ImageSet(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(2))
    write_mistakes(RunFolder(tmp_path), outcomes, part, 32)
    assert json.loads((tmp_path / "test.json").read_text())["wrongest"] == []
    with Image.open(tmp_path / "wrongest.png") as shown:
        assert shown.convert("L").getextrema() == (0, 255)  # it says so


class TestTensorBoard:
    def test_missing_package_is_an_error_before_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = importlib.util.find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name: None if name == "tensorboard" else real(name)
        )
        with pytest.raises(train.ConfigError, match=r"pip install fastres\[tensorboard\]"):
            fit(tmp_path / "run", tensorboard=True)
        assert not (tmp_path / "run").exists()

    def test_scalars_of_a_run_that_was_resumed(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        out = tmp_path / "run"
        fit(out, tensorboard=True)
        assert "tensorboard" in {path.name for path in out.iterdir()}
        result = fit(out, tensorboard=True, resume=True, epochs=3)
        events = EventAccumulator(str(out / "tensorboard"))
        events.Reload()
        for tag, key in (("loss/train", "train_loss"), ("accuracy/valid", "valid_accuracy")):
            found = [(event.step, event.value) for event in events.Scalars(tag)]
            expected = [(line["epoch"], line[key]) for line in result.history]
            assert found == [(step, pytest.approx(value)) for step, value in expected]
        assert events.Scalars("accuracy/test")[-1].value == pytest.approx(result.test_accuracy)
        assert {"lr", "images_per_second", "seconds"} <= set(events.Tags()["scalars"])

"""Fine-tuning: weights from torchvision or from a file, a new head, a frozen body."""

import json
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import fastres
from fastres import data, train
from fastres.cli import main
from fastres.train import checkpoint
from fastres.train.weights import freeze_body, keep_frozen_statistics, load_weights

CLASSES = ("a", "b", "c")


def fresh(classes: int = 3, **arguments: Any) -> nn.Module:
    torch.manual_seed(1)
    return fastres.resnet18(num_classes=classes, **arguments)


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """A state_dict of torchvision's resnet18, statistics and all away from their start."""
    torch.manual_seed(7)
    state = torchvision.models.resnet18().state_dict()
    return {
        key: value + 0.01 * torch.randn_like(value) if value.is_floating_point() else value
        for key, value in state.items()
    }


@pytest.fixture
def file(published: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    torch.save(published, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def assert_body(model: nn.Module, state: dict[str, torch.Tensor], head: bool) -> None:
    """The model has the state's values, in its head only if `head` says so, else its own start."""
    start = fresh(model.fc.out_features).state_dict()
    for key, value in model.state_dict().items():
        expected = state if head or not key.startswith("fc.") else start
        assert torch.equal(value, expected[key]), key


class TestFiles:
    def test_new_head_for_other_classes(
        self, file: Path, published: dict[str, torch.Tensor]
    ) -> None:
        model = fresh()
        assert not load_weights(model, "resnet18", str(file), CLASSES)
        assert_body(model, published, head=False)

    def test_head_for_as_many_classes(self, file: Path, published: dict[str, torch.Tensor]) -> None:
        model = fresh(1000)
        assert load_weights(model, "resnet18", str(file), [str(i) for i in range(1000)])
        assert_body(model, published, head=True)

    @pytest.mark.parametrize("wrapped", ["module.", "model", "state_dict", "counters", "headless"])
    def test_what_other_programs_write(
        self, wrapped: str, published: dict[str, torch.Tensor], tmp_path: Path
    ) -> None:
        content: dict[str, Any] = {
            "module.": {f"module.{key}": value for key, value in published.items()},
            "model": {"model": published, "epoch": 3},
            "state_dict": {"state_dict": published},
            "counters": {k: v for k, v in published.items() if "num_batches" not in k},
            "headless": {k: v for k, v in published.items() if not k.startswith("fc.")},
        }[wrapped]
        torch.save(content, tmp_path / "file.pth")
        model = fresh()
        assert not load_weights(model, "resnet18", str(tmp_path / "file.pth"), CLASSES)
        assert_body(model, published, head=False)

    def test_checkpoint_keeps_its_head_for_its_own_classes_only(self, tmp_path: Path) -> None:
        torch.manual_seed(5)
        state = fastres.resnet18(num_classes=3).state_dict()
        content = {"model": state, "model_name": "resnet18", "classes": list(CLASSES)}
        checkpoint.save(tmp_path / "best.pt", content)
        for classes, same in ((CLASSES, True), (("a", "b", "x"), False)):
            model = fresh()
            assert load_weights(model, "resnet18", str(tmp_path / "best.pt"), classes) is same
            assert_body(model, state, head=same)
        with pytest.raises(
            train.CheckpointError, match=r"best\.pt is a resnet18, expected a resnet34"
        ):
            load_weights(fastres.resnet34(), "resnet34", str(tmp_path / "best.pt"), CLASSES)

    def test_other_stem_is_named(self, file: Path) -> None:
        model = fresh(stem="cifar")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(
            train.CheckpointError,
            match=r"weights\.pt does not fit resnet18 \(its stem is another one: see --stem\): of "
            r"other shapes are conv1\.weight \(64, 3, 7, 7\), expected \(64, 3, 3, 3\)$",
        ):
            load_weights(model, "resnet18", str(file), CLASSES)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])

    def test_other_model_is_named_by_its_keys(self, file: Path) -> None:
        model = fastres.resnet50(num_classes=3)
        with pytest.raises(
            train.CheckpointError,
            match=r"does not fit resnet50: it lacks layer1\.0\.conv3\.weight; .* and \d+ more, of "
            r"other shapes are layer1\.0\.conv1\.weight",
        ):
            load_weights(model, "resnet50", str(file), CLASSES)

    def test_other_keys_are_named(self, published: dict[str, torch.Tensor], tmp_path: Path) -> None:
        torch.save({**published, "layer9.weight": torch.ones(1)}, tmp_path / "more.pt")
        with pytest.raises(train.CheckpointError, match=r"it has besides layer9\.weight$"):
            load_weights(fresh(), "resnet18", str(tmp_path / "more.pt"), CLASSES)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is damaged or holds no weights"),
            (b"hello", "is damaged or holds no weights: expected a file of tensors and plain"),
            ([1, 2], "holds a list, expected a state_dict"),
            ({}, "holds no state_dict: expected names and tensors"),
            ({"a": 1}, "holds no state_dict: expected names and tensors"),
            ({"model": {"a": "b"}}, "holds no state_dict: expected names and tensors"),
            (fresh, "is damaged or holds no weights: expected a file of tensors and plain"),
        ],
    )
    def test_damaged_files_are_named(self, content: Any, message: str, tmp_path: Path) -> None:
        path = tmp_path / "bad.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(train.CheckpointError, match=rf"bad\.pt {message}"):
            load_weights(fresh(), "resnet18", str(path), CLASSES)

    def test_neither_a_name_nor_a_file(self) -> None:
        with pytest.raises(
            train.ConfigError,
            match=r"weights is 'IMAGENET1K_V2', expected a file or one of torchvision's for "
            r"resnet18: IMAGENET1K_V1, DEFAULT",
        ):
            load_weights(fresh(), "resnet18", "IMAGENET1K_V2", CLASSES)


class TestDownload:
    """torchvision's own way to its weights, with the network alone replaced."""

    @pytest.fixture(autouse=True)
    def cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
        return tmp_path / "cache" / "hub" / "checkpoints"

    @pytest.mark.parametrize("name", ["IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", "DEFAULT"])
    def test_by_name(
        self,
        name: str,
        file: Path,
        cache: Path,
        published: dict[str, torch.Tensor],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        asked = []

        def download(url: str, target: str, hash_prefix: str, progress: bool) -> None:
            asked.append((url, hash_prefix))
            Path(target).write_bytes(file.read_bytes())

        monkeypatch.setattr("torch.hub.download_url_to_file", download)
        for _ in range(2):  # the second time it is in the cache
            model = fresh()
            assert not load_weights(model, "resnet18", name, CLASSES)
            assert_body(model, published, head=False)
        assert asked == [("https://download.pytorch.org/models/resnet18-f37072fd.pth", "f37072fd")]
        assert [path.name for path in cache.iterdir()] == ["resnet18-f37072fd.pth"]

    def test_no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_network(*arguments: object, **options: object) -> None:
            raise urllib.error.URLError("no network")

        monkeypatch.setattr("torch.hub.urlopen", no_network)
        with pytest.raises(
            train.CheckpointError,
            match=r"torchvision's IMAGENET1K_V1 cannot be had from https://.*pth: .*no network.*; "
            "download it elsewhere and give --weights FILE",
        ):
            load_weights(fresh(), "resnet18", "IMAGENET1K_V1", CLASSES)

    def test_damaged_cache(self, cache: Path) -> None:
        cache.mkdir(parents=True)
        (cache / "resnet18-f37072fd.pth").write_bytes(b"half a file")
        with pytest.raises(train.CheckpointError, match="IMAGENET1K_V1 cannot be had"):
            load_weights(fresh(), "resnet18", "IMAGENET1K_V1", CLASSES)


@pytest.mark.parametrize("fused", [False, True])
class TestFreeze:
    def test_only_the_head_changes(self, fused: bool) -> None:
        model = fresh(fused=fused, stem="cifar")
        freeze_body(model)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))] * 2
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9)
        train.train_one_epoch(model, batches, optimizer)
        assert model.training
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]) == (not key.startswith("fc.")), key

    def test_body_computes_what_it_did(self, fused: bool) -> None:
        """The first loss of training is the loss of evaluation: no batch statistics."""
        model = fresh(fused=fused, stem="cifar")
        freeze_body(model)
        batch = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))]
        expected = train.evaluate(model, batch).mean_loss
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = train.train_one_epoch(model, batch, optimizer).mean_loss
        assert loss == pytest.approx(expected, rel=1e-5)

    def test_batchnorm_that_is_trained_is_left_alone(self, fused: bool) -> None:
        model = fresh(fused=fused).train()
        model.layer1.requires_grad_(False)
        keep_frozen_statistics(model)
        for key, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.training != key.startswith("layer1."), key


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 training and 8 test images in the sample's place."""
    whole = data.sample()
    part = data.Dataset(whole.train[torch.arange(24)], whole.test[torch.arange(8)])
    for module in ("loop", "inference"):
        monkeypatch.setattr(f"fastres.train.{module}.load", lambda name, root: part)


def test_whole_road(
    file: Path,
    published: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From a file that is gone when the run goes on, with everything but the head frozen."""
    few(monkeypatch)
    monkeypatch.chdir(tmp_path)
    line = "train --batch-size 8 --device cpu --out run --epochs"
    assert main([*line.split(), "1", "--weights", str(file), "--freeze", "--stem", "imagenet"]) == 0
    file.unlink()
    assert main([*line.split(), "2", "--resume"]) == 0, capsys.readouterr().err
    model, content = train.load_model(Path("run/best.pt"))
    assert content["model_arguments"] == {"stem": "imagenet", "num_classes": 10}
    for key, value in model.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(value, published[key]), key
    assert json.loads(Path("run/config.json").read_text())["weights"] == str(file)


def test_nothing_is_begun_with_weights_that_do_not_fit(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few(monkeypatch)
    config = train.TrainConfig(weights=str(file), out=tmp_path / "run", device="cpu")
    with pytest.raises(train.CheckpointError, match=r"see --stem"):
        train.fit(config, progress=False)
    assert not (tmp_path / "run").exists()


def test_settings() -> None:
    with pytest.raises(train.ConfigError, match="freeze is True, expected --weights beside it"):
        train.TrainConfig(freeze=True)


def test_stem_is_that_of_torchvisions_weights() -> None:
    from fastres.train.parts import stem_for

    assert stem_for(32, train.TrainConfig(weights="IMAGENET1K_V1")) == "imagenet"
    assert stem_for(32, train.TrainConfig(weights="file.pt")) == "cifar"

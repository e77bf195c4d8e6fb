"""What a command is told: frozen dataclasses, from which the command line is made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastres.data.augment import FlipName
from fastres.data.datasets import FOLDER

ModelName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
DATA = ("sample", "cifar10", "folder:PATH")
AmpName = Literal["none", "bf16", "fp16", "auto"]
RecipeName = Literal["standard", "best", "best-short"]
ScheduleName = Literal["step", "cosine", "one-cycle"]
StemName = Literal["auto", "imagenet", "cifar"]
DataName = Annotated[str, tyro.conf.arg(metavar="{sample,cifar10,folder:PATH}")]
Directory = Annotated[Path, tyro.conf.arg(metavar="DIR")]


class ConfigError(ValueError):
    """A setting has a value that cannot be; the message names field, value and expectation."""


def _expect(config: Any, field: str, ok: bool, expectation: str) -> None:
    if not ok:
        raise ConfigError(f"{field} is {getattr(config, field)!r}, expected {expectation}")


def _expect_choice(config: Any, field: str, choices: Any) -> None:
    _expect(
        config, field, getattr(config, field) in choices.__args__, " or ".join(choices.__args__)
    )


def _expect_whole(config: Any, field: str, least: int) -> None:
    value = getattr(config, field)
    whole = isinstance(value, int) and not isinstance(value, bool)
    _expect(config, field, whole and value >= least, f"a whole number, at least {least}")


def _expect_data(config: Any, field: str) -> None:
    value = getattr(config, field)
    _expect(config, field, is_folder(value) or value in DATA[:2], " or ".join(DATA))


def _expect_real(config: Any, field: str, ok: Any, expectation: str) -> None:
    value = getattr(config, field)
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    _expect(config, field, real and ok(value), expectation)


def is_folder(data: str) -> bool:
    """Whether `data` names a folder of pictures."""
    return data.startswith(FOLDER) and data != FOLDER


@dataclass(frozen=True)
class TrainConfig:
    """Train a ResNet on CIFAR-10, on the packaged sample of it or on own pictures, by a recipe.

    A recipe is a name and a version for values of all these settings; each can be given anew.
    `standard`: SGD with momentum, a step schedule, crop and flip. `best`: what reaches the highest
    accuracy a minute. `best-short`: the like in 36 epochs, of smaller batches. Each watches the
    validation part, stops early, restores the best epoch and takes the test part once, at the end.
    Everything the run finds out is in its folder.
    """

    recipe: RecipeName = "standard"
    """Where the settings that are not given come from (in Python: fastres.train.recipe(NAME))."""

    recipe_version: tyro.conf.SuppressFixed[tyro.conf.Fixed[int]] = 1
    """Of the recipe; it changes whenever a value of the recipe does."""

    model: ModelName = "resnet18"
    """Member of the family."""

    data: DataName = "sample"
    """The packaged sample (4,600 images), the official CIFAR-10, or class folders of pictures:
    PATH/CLASS/..., or PATH/train/CLASS/... with valid and test beside it."""

    root: Directory = Path("datasets")
    """Where the official CIFAR-10 is, or is downloaded to."""

    epochs: int = 100
    """Passes over the training part, at most."""

    batch_size: int = 128
    """Images a step."""

    lr: float = 0.02
    """Learning rate, the schedule's highest; it grows with the batch (Goyal et al. 2017)."""

    schedule: ScheduleName = "step"
    """Of the learning rate: drops (He et al. 2016), half a cosine (Loshchilov and Hutter 2017), or
    straight up and down (Smith and Topin 2019)."""

    warmup: float = 0.0
    """Share of all steps in which the rate first rises (Goyal et al. 2017); not with step."""

    step_size: int = 30
    """Epochs between two drops of the learning rate, with step."""

    gamma: float = 0.1
    """What a drop multiplies the learning rate by, with step."""

    momentum: float = 0.9
    """Momentum of SGD."""

    nesterov: bool = False
    """Nesterov's momentum (Sutskever et al. 2013)."""

    weight_decay: float = 5e-4
    """L2 penalty."""

    decay_norm: bool = True
    """Weight decay on BatchNorm and biases too; without: He et al. 2019, section 3.1."""

    label_smoothing: float = 0.0
    """Share of every label that is spread over all classes (Szegedy et al. 2016, section 7)."""

    flip: FlipName = "random"
    """Mirror half of the training images, drawn anew every epoch, or each in every second epoch
    (alternating: Jordan 2024, section 3.6)."""

    cutout: int = 0
    """Side in pixels of a square set to the mean in every training image (DeVries and Taylor 2017);
    0: none."""

    ema: float = 0.0
    """Decay a step of a moving average of the weights, which is what is evaluated and kept (Polyak
    and Juditsky 1992); 0: none."""

    seed: int = 0
    """Of the weights, the split, the order and the augmentation."""

    valid_ratio: float = 0.2
    """Share of the training images held out for validation."""

    test_ratio: float = 0.1
    """Share of a folder's pictures held out for testing, where it has no test folder."""

    image_size: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Height and width to which a folder's pictures are cut; left out: 224."""

    stem: StemName = "auto"
    """The network's first layers; auto: imagenet with torchvision's weights, else cifar (no
    downsampling) up to 64 pixels and imagenet above."""

    weights: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE")] = None
    """Start from torchvision's (IMAGENET1K_V1, ...), or from a checkpoint or state_dict file; the
    last layer is new where the classes differ."""

    freeze: bool = False
    """Train the last layer alone; the BatchNorms keep the statistics of --weights as well."""

    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Processes that read a folder's pictures; left out: one a core, up to 16."""

    patience: int = 30
    """Stop after so many epochs in a row without a better validation accuracy."""

    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:N."""

    amp: AmpName = "none"
    """Compute in bfloat16 or float16 where that is safe; the weights stay float32. auto: bfloat16
    on a GPU and on a CPU with AMX (Micikevicius et al. 2018; Kalamkar et al. 2019)."""

    channels_last: bool = True
    """Keep images and weights in channels_last memory; the answers are the same."""

    sync_bn: bool = False
    """Among several processes, take BatchNorm's statistics of all their images."""

    fused: bool = True
    """Use fastres's fused operations; the answers are the same."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """The run's folder; left out: runs/DATA-MODEL-TIME."""

    tensorboard: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the metrics for TensorBoard as well, to the folder tensorboard in the run's."""

    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on with the run in --out; its own settings are the defaults."""

    def __post_init__(self) -> None:
        _expect_choice(self, "model", ModelName)
        _expect_data(self, "data")
        _expect_choice(self, "stem", StemName)
        _expect_choice(self, "amp", AmpName)
        _expect_choice(self, "recipe", RecipeName)
        _expect_choice(self, "schedule", ScheduleName)
        _expect_choice(self, "flip", FlipName)
        for field in ("epochs", "batch_size", "step_size", "patience"):
            _expect_whole(self, field, 1)
        if self.image_size is not None:
            _expect_whole(self, "image_size", 32)
            _expect(self, "image_size", is_folder(self.data), "--data folder:PATH beside it")
        if self.workers is not None:
            _expect_whole(self, "workers", 0)
        _expect(self, "freeze", not (self.freeze and self.weights is None), "--weights beside it")
        for field in ("seed", "cutout"):
            _expect_whole(self, field, 0)
        _expect(self, "seed", self.seed < 2**32, "a whole number below 2**32")
        _expect_real(self, "lr", lambda x: x > 0, "a number above 0")
        _expect_real(self, "momentum", lambda x: 0 <= x < 1, "a number in [0, 1)")
        _expect_real(self, "weight_decay", lambda x: x >= 0, "a number, at least 0")
        _expect_real(self, "gamma", lambda x: 0 < x <= 1, "a number in (0, 1]")
        _expect_real(self, "valid_ratio", lambda x: 0 < x < 1, "a number in (0, 1)")
        _expect_real(self, "test_ratio", lambda x: 0 < x < 1, "a number in (0, 1)")
        for field in ("warmup", "label_smoothing", "ema"):
            _expect_real(self, field, lambda x: 0 <= x < 1, "a number in [0, 1)")
        no_warmup = self.schedule != "step" or self.warmup == 0
        _expect(self, "warmup", no_warmup, "0 with the step schedule")
        _expect(self, "nesterov", not self.nesterov or self.momentum > 0, "a momentum above 0")
        _expect(self, "resume", not (self.resume and self.out is None), "--out DIR beside it")


@dataclass(frozen=True)
class EvalConfig:
    """Loss and accuracy of a checkpoint on the test part of a data set.

    Of a folder that is its test folder, or else the pictures that the run held out; of a folder
    that the run has not seen, all.
    """

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """A best.pt or last.pt of `fastres train`."""

    data: DataName | None = None
    """Left out: the data set that the checkpoint was trained on."""

    root: Directory = Path("datasets")
    """Where the official CIFAR-10 is, or is downloaded to."""

    batch_size: int = 128
    """Images at a time."""

    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Processes that read a folder's pictures; left out: one a core, up to 16."""

    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:N."""

    fused: bool = True
    """Use fastres's fused operations; the answers are the same."""

    def __post_init__(self) -> None:
        _expect_whole(self, "batch_size", 1)
        if self.data is not None:
            _expect_data(self, "data")
        if self.workers is not None:
            _expect_whole(self, "workers", 0)


@dataclass(frozen=True)
class PredictConfig:
    """Classes and their probabilities for image files and for folders of them."""

    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Image files of any size, or folders, which are searched with all folders in them; each image
    is resized and cut to the square that the model was trained with."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """A best.pt or last.pt of `fastres train`."""

    top: int = 3
    """How many classes to print for an image."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON: a list of images with their classes and probabilities."""

    batch_size: int = 128
    """Images at a time."""

    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:N."""

    fused: bool = True
    """Use fastres's fused operations; the answers are the same."""

    def __post_init__(self) -> None:
        _expect(self, "images", len(self.images) > 0, "at least one image file or folder")
        _expect_whole(self, "batch_size", 1)
        _expect_whole(self, "top", 1)


# May differ between a run and its --resume: none changes what an epoch computes, but for the
# rounding of another device. The number of epochs does where it stretches the schedule.
FREE_ON_RESUME = frozenset({"root", "epochs", "device", "workers", "out", "tensorboard", "resume"})


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The settings as JSON types; `resume` is how a run was called and not one of them."""
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    del plain["resume"]
    return plain


def from_dict(plain: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_dict`.

    Raises:
        ConfigError: a setting is unknown, or has a value that cannot be.
    """
    names = {field.name for field in fields(TrainConfig)}
    if unknown := sorted(set(plain) - names):
        raise ConfigError(f"unknown settings {', '.join(unknown)}")
    paths = {k: Path(plain[k]) for k in ("root", "out") if plain.get(k) is not None}
    return TrainConfig(**{**plain, **paths})


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """The settings, old and new value, in which a resumed run must not differ but does."""
    free = FREE_ON_RESUME if old.schedule == "step" else FREE_ON_RESUME - {"epochs"}
    if is_folder(old.data) and is_folder(new.data):
        free |= {"data"}  # it may have moved: the pictures' names tell whether it is the same
    return [
        f"{field.name} (was {getattr(old, field.name)!r}, is {getattr(new, field.name)!r})"
        for field in fields(TrainConfig)
        if field.name not in free and getattr(old, field.name) != getattr(new, field.name)
    ]

"""The parts of a run's data, and how large its images are."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastres.data import DataError, Dataset, ImageSet, PictureFolder, PictureSet, split
from fastres.data.folder import LARGEST_SMALL_SIZE, MIN_SHARE
from fastres.train.config import TrainConfig
from fastres.train.report import make_console
from fastres.train.weights import torchvision_weights

Part: TypeAlias = ImageSet | PictureSet
FOLDER_IMAGE_SIZE = 224
MOST_WORKERS = 16


def image_size(dataset: Dataset | PictureFolder, config: TrainConfig) -> int:
    """Height and width of an image as the model gets it, in pixels."""
    if isinstance(dataset, PictureFolder):
        return config.image_size or FOLDER_IMAGE_SIZE
    return dataset.train.images.shape[-1]


def stem_for(size: int, config: TrainConfig) -> str:
    """The model's stem: what the config says, or the one that fits weights and image size."""
    if config.stem != "auto":
        return config.stem
    if config.weights is not None and torchvision_weights(config.model, config.weights):
        return "imagenet"
    return "cifar" if size <= LARGEST_SMALL_SIZE else "imagenet"


def worker_count(workers: int | None) -> int:
    """`workers`, or one for each core that this process may use, up to 16."""
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS) if workers is None else workers


def divide(dataset: Dataset | PictureFolder, config: TrainConfig) -> tuple[Part, Part, Part]:
    """Training, validation and test part.

    Raises:
        DataError: a part would be empty.
    """
    if isinstance(dataset, PictureFolder):
        return dataset.split(config.valid_ratio, config.test_ratio, config.seed)
    train, valid = split(len(dataset.train), config.valid_ratio, config.seed)
    return dataset.train[train], dataset.train[valid], dataset.test


def split_content(dataset: Dataset | PictureFolder, config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint keeps, so that `test_part` finds the same pictures."""
    return {
        "valid_ratio": config.valid_ratio,
        "test_ratio": config.test_ratio,
        "seed": config.seed,
        "path": str(dataset.path) if isinstance(dataset, PictureFolder) else None,
        "fingerprint": dataset.fingerprint if isinstance(dataset, PictureFolder) else None,
    }


def test_part(dataset: Dataset | PictureFolder, content: dict[str, Any]) -> Part:
    """The test part of a run with the `split_content` `content`, or all of an unseen folder.

    Raises:
        DataError: it is the run's folder, with other pictures in it than the run was given.
    """
    if isinstance(dataset, Dataset):
        return dataset.test
    if dataset.test is not None:
        return dataset.test
    if dataset.fingerprint == content["fingerprint"]:
        return dataset.split(content["valid_ratio"], content["test_ratio"], content["seed"])[2]
    if str(dataset.path) == content["path"]:
        raise DataError(
            f"{dataset.path} has other pictures than when the run began, so which of them it has "
            "not been trained on is lost: name a folder with a test folder in it, or of others"
        )
    return dataset.train


def check_pictures(parts: tuple[Part, ...], size: int, workers: int, *, progress: bool) -> None:
    """Decode every picture file once, before anything is begun, behind a bar with `progress`.

    Raises:
        DataError: pictures cannot be read, or are too small for images of `size` pixels a side.
    """
    pictures = [part for part in parts if isinstance(part, PictureSet)]
    if not pictures:
        return
    whole = PictureSet(
        tuple(path for part in pictures for path in part.paths),
        torch.cat([part.labels for part in pictures]),
    )
    console = make_console()
    columns = (TextColumn("checking pictures"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not (progress and console.is_terminal),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=len(whole))
        whole.check(-(-size // MIN_SHARE), workers=workers, on_picture=lambda: bar.advance(task))

"""The data sets: real images, held in memory as uint8 tensors."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastres.data.errors import DataError
from fastres.data.folder import PictureFolder, picture_folder

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
# Per channel, of the 50,000 training images scaled to [0, 1].
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
FOLDER = "folder:"  # begins the name of a folder of pictures
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class ImageSet:
    """Images (N, C, H, W) uint8 in channels_last memory, and their labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> ImageSet:
        """The images at the positions `index` (M,) int64."""
        return ImageSet(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> ImageSet:
        """The same on `device`."""
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A training part, a test part, and what a model must know of both."""

    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...] = CLASSES
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


def _image_set(images: np.ndarray, labels: np.ndarray) -> ImageSet:
    """From images (N, H, W, C) uint8: the permuted view is channels_last without a copy."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return ImageSet(pixels, torch.from_numpy(labels.astype(np.int64)))


def _untile(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The 32 x 32 tiles (N, 32, 32, 3), row by row, of a picture (H, W, 3)."""
    rows, columns = picture.shape[0] // 32, picture.shape[1] // 32
    grid = picture.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 1, 3, 4)
    tiles: npt.NDArray[np.uint8] = grid.reshape(rows * columns, 32, 32, 3)
    return tiles


def sample() -> Dataset:
    """The packaged sample: 3,600 training and 1,000 test images of CIFAR-10, classes balanced.

    Raises:
        DataError: the packaged files are missing or this Pillow cannot read WebP.
    """

    def part(name: str) -> ImageSet:
        path = files("fastres.data") / "sample" / f"{name}.webp"
        try:
            with path.open("rb") as file, Image.open(file) as picture:
                images = _untile(np.asarray(picture.convert("RGB")))
        except FileNotFoundError as error:
            raise DataError(f"the packaged sample is missing: {path}: reinstall fastres") from error
        except UnidentifiedImageError as error:
            raise DataError(f"Pillow cannot read {path}: it needs a Pillow with WebP") from error
        return _image_set(images, np.arange(len(images)) % len(CLASSES))

    return Dataset(part("train"), part("test"))


def cifar10(root: str | Path) -> Dataset:
    """The official CIFAR-10 under `root`, downloaded there if it is missing.

    Raises:
        DataError: the files are not there (or damaged) and cannot be downloaded.
    """
    from torchvision.datasets import CIFAR10

    def part(train: bool) -> ImageSet:
        source = CIFAR10(str(root), train=train, download=False)
        return _image_set(source.data, np.array(source.targets))

    try:
        return Dataset(part(True), part(False))
    except RuntimeError:  # torchvision: "Dataset not found or corrupted"
        pass
    try:
        CIFAR10(str(root), download=True)
        return Dataset(part(True), part(False))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"CIFAR-10 is not under {root} and could not be downloaded ({error}); put "
            f"cifar-10-batches-py/ or cifar-10-python.tar.gz from {CIFAR10_URL} there"
        ) from error


def load(name: str, root: str | Path) -> Dataset | PictureFolder:
    """The data set called "sample", "cifar10" or "folder:PATH"; only cifar10 looks at `root`.

    Raises:
        ValueError: `name` is none of them.
        DataError: the data cannot be had.
    """
    if name == "sample":
        return sample()
    if name == "cifar10":
        return cifar10(root)
    if name.startswith(FOLDER) and name != FOLDER:
        return picture_folder(name.removeprefix(FOLDER))
    raise ValueError(f'data is {name!r}, expected "sample", "cifar10" or "folder:PATH"')

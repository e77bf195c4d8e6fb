"""The seeded split, and batches whose order and augmentation follow from (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastres.data.augment import normalize, random_crop_flip
from fastres.data.datasets import ImageSet
from fastres.data.draws import EPOCH, SPLIT, generator
from fastres.data.errors import DataError


def split(n: int, valid_ratio: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions (int64) of the training and of the validation part of `n` images.

    Raises:
        DataError: one of the two parts would be empty.
    """
    n_valid = round(n * valid_ratio)
    if not 0 < n_valid < n:
        raise DataError(
            f"valid_ratio is {valid_ratio}, which leaves {n - n_valid} of {n} images for training "
            f"and {n_valid} for validation: expected at least one in each"
        )
    order = torch.randperm(n, generator=generator(SPLIT, seed))
    return order[n_valid:], order[:n_valid]


class Batches:
    """Batches of normalised float32 images (N, C, H, W), channels_last, and their labels (N,).

    Without augmentation: the images in their own order. With it: shuffled, each image cropped at
    random out of itself padded with `padding` zeros and mirrored with probability one half. All of
    it is a function of (seed, epoch); call `set_epoch` before each epoch.

    Args:
        part: the images and labels, on the device where the batches are wanted.
        batch_size: images a batch; the last batch may be smaller.
        mean, std: per channel, of images scaled to [0, 1].
        augment: shuffle, crop and flip.
        seed: of the order and of the augmentation.
        padding: pixels on every side of which the crop is taken.
    """

    def __init__(
        self,
        part: ImageSet,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        augment: bool = False,
        seed: int = 0,
        padding: int = 4,
    ) -> None:
        self.part = part
        self.batch_size = batch_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.augment = augment
        self.seed = seed
        self.padding = padding
        self.epoch = 0

    def __len__(self) -> int:
        """The number of batches."""
        return -(-len(self.part) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation the next iteration takes."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.iterate()

    def iterate(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from number `first` on, exactly as a full iteration would give them."""
        n = len(self.part)
        device = self.part.images.device
        starts = range(first * self.batch_size, n, self.batch_size)
        if not self.augment:
            for start in starts:
                batch = slice(start, start + self.batch_size)
                images = self.part.images[batch]
                yield normalize(images, self.mean, self.std), self.part.labels[batch]
            return
        draw = generator(EPOCH, self.seed, self.epoch)
        order = torch.randperm(n, generator=draw).to(device)
        top, left = torch.randint(2 * self.padding + 1, (2, n), generator=draw).to(device)
        flip = torch.randint(2, (n,), generator=draw).bool().to(device)
        for start in starts:
            batch = slice(start, start + self.batch_size)
            images = self.part.images[order[batch]]
            images = random_crop_flip(images, top[batch], left[batch], flip[batch], self.padding)
            yield normalize(images, self.mean, self.std), self.part.labels[order[batch]]

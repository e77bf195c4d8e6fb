"""The seeded split, and batches whose order and augmentation follow from (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastres.data.augment import (
    FlipName,
    alternating_flips,
    cutout,
    expect_flip,
    normalize,
    random_crop_flip,
)
from fastres.data.datasets import ImageSet
from fastres.data.draws import EPOCH, SPLIT, generator
from fastres.data.errors import DataError
from fastres.data.shares import SharedBatches


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


class Batches(SharedBatches[ImageSet]):
    """Batches of normalised float32 images (N, C, H, W) and their labels (N,).

    Without augmentation: the images in their own order. With it: shuffled, each image cropped at
    random out of itself padded with `padding` zeros, mirrored half of the time, and a square of
    `cutout` pixels' side in it set to the mean. All of it is a function of (seed, epoch); call
    `set_epoch` before each epoch.

    No worker prepares batches ahead: on a GPU one is a few kernels that are queued while the step
    before it still runs, and nothing in it waits for the GPU; on a CPU it takes less than a
    hundredth of the time that a ResNet takes for it.

    Args:
        part: the images and labels, on the device where the batches are wanted.
        batch_size: images a batch; the last batch may be smaller.
        mean, std: per channel, of images scaled to [0, 1].
        augment: shuffle, crop, flip and cut out.
        seed: of the order and of the augmentation.
        padding: pixels on every side of which the crop is taken.
        flip: which images are mirrored: "random", drawn anew every epoch, or "alternating", each in
            every second epoch.
        cutout: side of the square in pixels; 0 is none.
        channels_last: the batches' memory layout.
        share: (rank, size): of several processes, each takes its part of every batch; the parts
            together are the batch, and an empty one is left out.

    Raises:
        ValueError: `flip` is neither.
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
        flip: FlipName = "random",
        cutout: int = 0,
        channels_last: bool = True,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        expect_flip(flip)
        super().__init__(part, batch_size, share)
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.augment = augment
        self.seed = seed
        self.padding = padding
        self.flip = flip
        self.cutout = cutout
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def iterate(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.part)
        device = self.part.images.device
        batches = self.places(first)
        if not self.augment:
            for batch in batches:
                images = normalize(self.part.images[batch], self.mean, self.std)
                yield images.contiguous(memory_format=self.layout), self.part.labels[batch]
            return
        draw = generator(EPOCH, self.seed, self.epoch)
        order = torch.randperm(n, generator=draw)
        top, left = torch.randint(2 * self.padding + 1, (2, n), generator=draw).to(device)
        flip = torch.randint(2, (n,), generator=draw).bool()  # drawn either way, as what follows
        if self.flip == "alternating":
            flip = alternating_flips(n, self.seed, self.epoch)[order]
        flip = flip.to(device)
        order = order.to(device)
        pixels = self.part.images.permute(0, 2, 3, 1)
        h, w = self.part.images.shape[2:]  # the centres are drawn last, so the rest is as without
        row, column = (torch.randint(size, (n,), generator=draw).to(device) for size in (h, w))
        for batch in batches:
            picked = pixels.index_select(0, order[batch])  # of NHWC: whole images are copied
            images = picked.permute(0, 3, 1, 2)
            images = random_crop_flip(images, top[batch], left[batch], flip[batch], self.padding)
            images = normalize(images, self.mean, self.std)
            if self.cutout:
                cutout(images, row[batch], column[batch], self.cutout)
            yield images.contiguous(memory_format=self.layout), self.part.labels[order[batch]]

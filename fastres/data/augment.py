"""Augmentation and normalisation of whole batches, where the images live."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from fastres.data.draws import FLIP, generator

# Elements of large pictures that are computed at a time: they stay in a core's cache, and torch
# leaves so few to one core, while the others read the next pictures.
PIECE = 2**15 - 1

FlipName = Literal["random", "alternating"]


def expect_flip(flip: str) -> None:
    """Let nothing pass but a FlipName.

    Raises:
        ValueError: `flip` is none.
    """
    if flip not in get_args(FlipName):
        raise ValueError(f"flip is {flip!r}, expected {' or '.join(get_args(FlipName))}")


def alternating_flips(n: int, seed: int, epoch: int) -> Tensor:
    """(n,) bool: whether each of `n` images is mirrored in `epoch`, a function of all three.

    A fair coin decides the first epoch; from then on an image is mirrored in every second epoch, so
    that two epochs in a row have both sides of every image (Jordan 2024, "94% on CIFAR-10 in 3.29
    Seconds on a Single GPU", section 3.6). Independent coins show the same side again half the
    time.
    """
    first = torch.randint(2, (n,), generator=generator(FLIP, seed))
    return (first + epoch) % 2 == 1


def random_crop_flip(
    images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int
) -> Tensor:
    """Pad each image with zeros, crop it back to its size, and mirror it where asked.

    With `top` and `left` uniform in [0, 2 * padding] and `flip` a fair coin this is torchvision's
    RandomCrop(size, padding) followed by RandomHorizontalFlip.

    Args:
        images: (N, C, H, W) uint8, best in channels_last memory.
        top, left: (N,) int64, the crop's corner in the padded image.
        flip: (N,) bool.
        padding: pixels added on every side.

    Returns:
        (N, C, H, W) uint8 in channels_last memory.
    """
    n, c, h, w = images.shape
    pixels = images.permute(0, 2, 3, 1)
    padded = images.new_zeros(2, n, h + 2 * padding, w + 2 * padding, c)
    inside = padded[:, :, padding : padding + h, padding : padding + w]
    inside[0] = pixels
    inside[1] = pixels.flip(2)
    # Every possible crop as a view: (flip, N, top, left, H, W, C). One gather copies whole rows.
    mirror, image, row, column, channel = padded.stride()
    crops = padded.as_strided(
        (2, n, 2 * padding + 1, 2 * padding + 1, h, w, c),
        (mirror, image, row, column, row, column, channel),
    )
    left = torch.where(flip, 2 * padding - left, left)
    cropped = crops[flip.long(), torch.arange(n, device=images.device), top, left]
    return cropped.permute(0, 3, 1, 2)


def cutout(images: Tensor, row: Tensor, column: Tensor, side: int) -> Tensor:
    """Set a square of every image to zero, which is the mean of normalised images, in place.

    Cutout as in DeVries and Taylor 2017: the centre is anywhere, so the square may be cut off.

    Args:
        images: (N, C, H, W) floating, changed.
        row, column: (N,) int64, the square's centre.
        side: of the square in pixels; it begins side // 2 before the centre.

    Returns:
        `images`.
    """
    h, w = images.shape[2:]
    top, left = (row - side // 2)[:, None], (column - side // 2)[:, None]
    rows, columns = (torch.arange(size, device=images.device) for size in (h, w))
    in_rows = (rows >= top) & (rows < top + side)
    in_columns = (columns >= left) & (columns < left + side)
    return images.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images / 255 - mean) / std per channel: (N, C, H, W) uint8 to float32, memory layout kept.

    The same arithmetic, in the same order, as torchvision's ToTensor and Normalize.
    """
    n, c, h, w = images.shape
    result = torch.empty_like(images, dtype=torch.float32)
    pixels, values = images.permute(0, 2, 3, 1), result.permute(0, 2, 3, 1)
    width, piece = 1, n
    if result.is_contiguous(memory_format=torch.channels_last):
        # Row by row: the channels of one pixel would make too short a loop.
        pixels, values = pixels.reshape(n * h, w * c), values.view(n * h, w * c)
        width, piece = w, n * h
        if images.is_cpu and h * w * c > PIECE:
            piece = PIECE // (w * c)
    centre, scale = (_row(tuple(v), width, images.device) for v in (mean, std))
    piece = max(1, piece)
    for source, target in zip(pixels.split(piece), values.split(piece), strict=True):
        target.copy_(source).div_(255).sub_(centre).div_(scale)
    return result


@lru_cache(maxsize=64)
def _row(values: tuple[float, ...], width: int, device: torch.device) -> Tensor:
    """The values of `width` pixels, float32, kept: each copy to a GPU would wait for its work."""
    return torch.tensor(values, device=device).repeat(width)

"""Data sets in memory, the seeded split, and augmentation on whole batches."""

from fastres.data.augment import normalize, random_crop_flip
from fastres.data.batches import Batches, split
from fastres.data.datasets import DataError, Dataset, ImageSet, cifar10, load, sample

__all__ = [
    "Batches",
    "DataError",
    "Dataset",
    "ImageSet",
    "cifar10",
    "load",
    "normalize",
    "random_crop_flip",
    "sample",
    "split",
]

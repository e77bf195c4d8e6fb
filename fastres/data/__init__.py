"""Data sets in memory and in folders, the seeded split, and augmentation."""

from fastres.data.augment import cutout, normalize, random_crop_flip
from fastres.data.batches import Batches, split
from fastres.data.datasets import Dataset, ImageSet, cifar10, load, sample
from fastres.data.errors import DataError
from fastres.data.folder import (
    PictureBatches,
    PictureFolder,
    PictureSet,
    picture_folder,
    read_picture,
)

__all__ = [
    "Batches",
    "DataError",
    "Dataset",
    "ImageSet",
    "PictureBatches",
    "PictureFolder",
    "PictureSet",
    "cifar10",
    "cutout",
    "load",
    "normalize",
    "picture_folder",
    "random_crop_flip",
    "read_picture",
    "sample",
    "split",
]

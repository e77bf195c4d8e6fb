"""Cut the packaged sample (fastres/data/sample/) from the official CIFAR-10 files.

    python tools/make_sample.py --root DIR [--out fastres/data/sample]

DIR holds cifar-10-batches-py/ (what torchvision.datasets.CIFAR10(DIR, download=True) leaves).
Of each class the first 360 images of the training files and the first 100 of the test file are
taken, in the files' own order, and laid out as one lossless WebP picture per part: 50 images a
row, column c holds class c % 10. So the picture needs no label file, and anybody can check it.

Source: Alex Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

PER_CLASS = {"train": 360, "test": 100}
COLUMNS = 50


def first_of_each_class(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Positions of the first `per_class` images of classes 0, 1, ..., 9, 0, 1, ... interleaved."""
    of_class = [np.flatnonzero(labels == c)[:per_class] for c in range(10)]
    return np.stack(of_class, axis=1).ravel()


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """One picture (rows * 32, columns * 32, 3) of images (N, 32, 32, 3), row by row."""
    rows = len(images) // columns
    grid = images.reshape(rows, columns, 32, 32, 3).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * 32, columns * 32, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="holds cifar-10-batches-py/")
    parser.add_argument("--out", type=Path, default=Path("fastres/data/sample"))
    args = parser.parse_args()

    for part, per_class in PER_CLASS.items():
        source = CIFAR10(str(args.root), train=part == "train", download=False)
        chosen = first_of_each_class(np.array(source.targets), per_class)
        picture = Image.fromarray(tile(source.data[chosen], COLUMNS))
        path = args.out / f"{part}.webp"
        picture.save(path, "webp", lossless=True, quality=100, method=6)
        print(f"{path}: {len(chosen)} images, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

"""Own pictures: class folders on the disk, checked before use, read by worker processes."""

from __future__ import annotations

import hashlib
import multiprocessing.util
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_bool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray, RawValue
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchvision.transforms import v2

from fastres.data.augment import FlipName, alternating_flips, cutout, expect_flip, normalize
from fastres.data.draws import EPOCH, PICTURE, SPLIT, generator, seed_of
from fastres.data.errors import DataError
from fastres.data.shares import SharedBatches

# Per channel, of ImageNet's training images scaled to [0, 1]: what torchvision's weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# What the folders of the parts are called: ours, torchvision's and the Hugging Face Hub's names.
PART_NAMES = {
    "train": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
}
LARGEST_SMALL_SIZE = 64  # pixels: up to here pictures are used whole and the CIFAR stem fits
MIN_SHARE = 8  # a side below the image size over this would be mostly interpolation
MAX_NAMED = 5  # faults that an error names one by one


@dataclass(frozen=True)
class PictureSet:
    """Picture files and their labels (N,) int64."""

    paths: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> PictureSet:
        """The pictures at the positions `index` (M,) int64."""
        return PictureSet(tuple(self.paths[i] for i in index.tolist()), self.labels[index])

    def check(
        self, min_side: int, *, workers: int = 1, on_picture: Callable[[], None] | None = None
    ) -> None:
        """Decode every picture, in `workers` threads, and call `on_picture` after each.

        Raises:
            DataError: pictures cannot be read or have a side below `min_side` pixels; it names
                the first of them.
        """

        def fault(path: str) -> str | None:
            try:
                width, height = read_picture(path).size
            except DataError as error:
                return str(error)
            if min(width, height) < min_side:
                return f"{path} has {width} x {height} pixels, expected at least {min_side} a side"
            return None

        faults = []
        with ThreadPoolExecutor(max(1, workers)) as threads:
            try:
                for found in threads.map(fault, self.paths):
                    if found:
                        faults.append(found)
                    if on_picture:
                        on_picture()
            except BaseException:  # Ctrl-C: end now, and not after all the pictures in the queue
                threads.shutdown(cancel_futures=True)
                raise
        if faults:
            rest = f"; and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
            raise DataError(
                f"{len(faults)} of {len(self)} pictures cannot be used: "
                f"{'; '.join(faults[:MAX_NAMED])}{rest}"
            )


@dataclass(frozen=True)
class PictureFolder:
    """Pictures by class: a training part, and the other parts where they have their folders."""

    path: Path
    classes: tuple[str, ...]
    train: PictureSet
    valid: PictureSet | None = None
    test: PictureSet | None = None
    mean: ClassVar[tuple[float, ...]] = IMAGENET_MEAN
    std: ClassVar[tuple[float, ...]] = IMAGENET_STD

    @property
    def fingerprint(self) -> str:
        """Of the names of all pictures: the same names are split in the same way."""
        names = [
            os.path.relpath(path, self.path)
            for part in (self.train, self.valid, self.test)
            if part is not None
            for path in part.paths
        ]
        return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()

    def split(
        self, valid_ratio: float, test_ratio: float, seed: int
    ) -> tuple[PictureSet, PictureSet, PictureSet]:
        """Training, validation and test part.

        A part without a folder of its own is held out of the training pictures: of each class
        that share, at least one picture, as the seed and the names say.

        Raises:
            DataError: a class would have no picture left for training.
        """
        held_out = (
            0.0 if self.valid is not None else valid_ratio,
            0.0 if self.test is not None else test_ratio,
        )
        pieces: tuple[list[Tensor], ...] = ([], [], [])
        for label, name in enumerate(self.classes):
            (positions,) = torch.nonzero(self.train.labels == label, as_tuple=True)
            counts = [max(1, round(len(positions) * share)) if share else 0 for share in held_out]
            if sum(counts) >= len(positions):
                raise DataError(
                    f"class {name} in {self.path} has {len(positions)} pictures, but {counts[0]} "
                    f"for validation and {counts[1]} for testing are to be held out of them"
                )
            order = torch.randperm(len(positions), generator=generator(SPLIT, seed, label))
            sizes = [len(positions) - sum(counts), *counts]
            for piece, index in zip(pieces, order.split(sizes), strict=True):
                piece.append(positions[index.sort().values])
        train, valid, test = (self.train[torch.cat(piece)] for piece in pieces)
        return (
            train,
            valid if self.valid is None else self.valid,
            test if self.test is None else self.test,
        )


def picture_folder(path: str | Path) -> PictureFolder:
    """The pictures in PATH/CLASS/..., or in PATH/train/CLASS/... and PATH/valid, PATH/test.

    PATH/val and PATH/validation are PATH/valid by other names. Folders within a class's folder
    belong to it; names that begin with a dot are left out. No picture is opened.

    Raises:
        DataError: there is no such folder, it is laid out in another way, a class has no picture,
            a file is no picture by its suffix, or there is but one class.
    """
    path = Path(path).expanduser().resolve()
    inside = _folders(path, "a folder of pictures")
    given: dict[str, Path] = {}
    for entry in inside:
        if part := PART_NAMES.get(entry.name):
            if part in given:
                raise DataError(f"{given[part]} and {entry} are both the {part} part: expected one")
            given[part] = entry
    if "train" not in given:
        if len(given) == len(inside):
            names = " and ".join(entry.name for entry in inside)
            raise DataError(f"{path} has {names} but no train folder")
        classes, train = _classes(path, inside)
        return PictureFolder(path, classes, train)
    if other := [entry for entry in inside if entry.name not in PART_NAMES]:
        raise DataError(
            f"{other[0]} stands beside {given['train']}: expected no folder but train, valid "
            "(or val) and test there"
        )
    classes, train = _classes(given["train"], _folders(given["train"], "class folders"))
    valid, test = (
        _held_out(given[name], classes) if name in given else None for name in ("valid", "test")
    )
    return PictureFolder(path, classes, train, valid, test)


def _visible(path: Path) -> list[Path]:
    """What is in a folder, by name."""
    return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))


def _folders(path: Path, expected: str) -> list[Path]:
    """The folders in a folder, which has nothing else."""
    if not path.exists():
        raise DataError(f"there is no folder {path}: expected {expected}")
    if not path.is_dir():
        raise DataError(f"{path} is a file, expected {expected}")
    entries = _visible(path)
    if not entries:
        raise DataError(f"{path} is empty, expected class folders in it")
    for entry in entries:
        if not entry.is_dir():
            raise DataError(f"{entry} is a file, expected nothing but folders in {path}")
    return entries


def _classes(path: Path, entries: Sequence[Path]) -> tuple[tuple[str, ...], PictureSet]:
    """The class folders' names, and the pictures in them."""
    classes = tuple(entry.name for entry in entries)
    if len(classes) < 2:
        raise DataError(f"{path} has the one class {classes[0]}, expected at least two")
    return classes, _pictures(entries, classes)


def _held_out(path: Path, classes: tuple[str, ...]) -> PictureSet:
    """The pictures of a part's own folder; it need not have every class."""
    entries = _folders(path, "class folders")
    for entry in entries:
        if entry.name not in classes:
            raise DataError(f"{entry} is a class that {path.parent / 'train'} does not have")
    return _pictures(entries, classes)


def _pictures(entries: Sequence[Path], classes: tuple[str, ...]) -> PictureSet:
    """The pictures in class folders, class by class and by name."""
    paths: list[str] = []
    labels: list[int] = []
    for entry in entries:
        found = list(_files(entry))
        if not found:
            raise DataError(f"class {entry.name} has no picture: {entry} is empty")
        paths += found
        labels += [classes.index(entry.name)] * len(found)
    return PictureSet(tuple(paths), torch.tensor(labels))


def _files(path: Path) -> Iterator[str]:
    for entry in _visible(path):
        if entry.is_dir():
            yield from _files(entry)
        elif entry.suffix.lower() in SUFFIXES:
            yield str(entry)
        else:
            raise DataError(f"{entry} is no picture: expected one of {', '.join(SUFFIXES)}")


def read_picture(path: str | Path) -> Image.Image:
    """The picture in a file, decoded, upright and in RGB.

    Raises:
        DataError: the file is missing, is no picture that Pillow can read, or one of more than 8
            bits a channel.
    """
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):  # Pillow would cut all that is above 255
                raise ValueError(f"its pixels are of mode {file.mode}, expected 8 bits a channel")
            ImageOps.exif_transpose(file, in_place=True)  # else it copies all there are
            picture: Image.Image = file if file.mode == "RGB" else file.convert("RGB")
            return picture
    except FileNotFoundError as error:
        raise DataError(f"no image at {path}") from error
    except Exception as error:  # each of Pillow's decoders has errors of its own for damage
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image"
        raise DataError(f"cannot read the image {path}: {reason}") from error


def resize_size(image_size: int) -> int:
    """What evaluation resizes the shorter side to, before it cuts out the middle.

    torchvision's 256 for 224; small pictures are kept whole.
    """
    return image_size if image_size <= LARGEST_SMALL_SIZE else round(image_size / 0.875)


def training_transform(image_size: int, flip: FlipName) -> v2.Transform:
    """A random crop, if `flip` is "random" with a random mirroring: a picture to (3, H, W) uint8.

    The crop is a random resized one, as for ImageNet; of small pictures, as for CIFAR-10, one out
    of the whole picture with an eighth of its size in zeros around it.
    """
    crop: list[v2.Transform] = [v2.RandomResizedCrop(image_size)]
    if image_size <= LARGEST_SMALL_SIZE:
        crop = [v2.Resize(image_size), v2.RandomCrop(image_size, padding=image_size // 8)]
    mirror = [v2.RandomHorizontalFlip()] if flip == "random" else []
    return v2.Compose([*crop, *mirror, v2.PILToTensor()])


def evaluation_transform(image_size: int, resize_size: int) -> v2.Transform:
    """Resize the shorter side, cut out the middle: a picture to (3, H, W) uint8."""
    return v2.Compose([v2.Resize(resize_size), v2.CenterCrop(image_size), v2.PILToTensor()])


class _Reader(torch.utils.data.Dataset[Tensor | DataError]):
    """Transformed pictures (H, W, 3) uint8 by epoch, position and mirroring, in a worker process.

    What is random in the transform is a function of the seed, epoch and position. A picture that
    cannot be read is returned as its error: raised here, it would come out with the worker's
    traceback.
    """

    def __init__(self, paths: Sequence[str], transform: v2.Transform, seed: int) -> None:
        self.paths = paths
        self.transform = transform
        self.seed = seed

    def __getitem__(self, place: tuple[int, int, bool]) -> Tensor | DataError:
        epoch, position, flip = place
        try:
            picture = read_picture(self.paths[position])
        except DataError as error:
            return error
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(PICTURE, self.seed, epoch, position))
            pixels: Tensor = self.transform(picture)
        return (pixels.flip(2) if flip else pixels).permute(1, 2, 0)


def _stack(pictures: list[Tensor | DataError]) -> Tensor | DataError:
    """(N, H, W, 3), or the first error."""
    tensors = []
    for picture in pictures:
        if isinstance(picture, DataError):
            return picture
        tensors.append(picture)
    batch: Tensor = default_collate(tensors)  # in a worker, into memory that the parent sees
    return batch


class _Workers:
    """What the processes that read for one loader and their parent tell each other.

    Ctrl-C reaches every process of a terminal, and a batch system's SIGTERM every process of a job:
    the parent ends its step first, and needs them until then. So they ignore both until the parent
    has said that they are to end. Without that word its own SIGTERM, the DataLoader's last resort
    where an iterator is collected together with its queues, would be ignored, too, and Python
    would wait for them for ever.
    """

    def __init__(self, count: int) -> None:
        self.ending = RawValue(c_bool, False)
        self.listening = RawArray(c_bool, count)

    def begin(self, worker: int) -> None:
        """In the worker process: leave signals to the parent."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self.listening[worker] = True

    def _on_sigterm(self, number: int, frame: object) -> None:
        if self.ending.value:
            os._exit(0)

    def end_with(self, iterator: Iterator[object], processes: Sequence[BaseProcess]) -> None:
        """Have the processes end when the iterator or Python does, whichever is first."""
        multiprocessing.util.Finalize(iterator, self._end, (processes,), exitpriority=100)

    def _end(self, processes: Sequence[BaseProcess]) -> None:
        self.ending.value = True
        for listening, process in zip(self.listening, processes, strict=True):
            if listening and process.is_alive():  # one that does not listen yet would fail by it
                process.terminate()


class PictureBatches(SharedBatches[PictureSet]):
    """Batches of normalised float32 pictures (N, 3, H, W) and their labels (N,).

    Without augmentation: the pictures in their own order, resized and cut to the middle. With it:
    shuffled, each cropped at random (see `training_transform`), mirrored half of the time, and
    a square of `cutout` pixels' side in it set to the mean. All of it is a function of (seed,
    epoch), whatever the number of workers; call `set_epoch` before each epoch. Each worker reads
    two batches ahead; the workers stay from one epoch to the next, so there can be but one
    iteration at a time.

    Args:
        part: the files and labels.
        batch_size: pictures a batch; the last batch may be smaller.
        mean, std: per channel, of pictures scaled to [0, 1].
        image_size: height and width of a picture in a batch, in pixels.
        resize_size: what the shorter side is resized to without augmentation, in pixels.
        device: where the batches are wanted.
        workers: processes that read the files; 0 reads them in this one.
        augment: shuffle, crop, flip and cut out.
        seed: of the order and of the augmentation.
        flip: which pictures are mirrored: "random", drawn anew every epoch, or "alternating", each
            in every second epoch.
        cutout: side of the square in pixels; 0 is none.
        channels_last: the batches' memory layout.
        share: (rank, size): of several processes, each takes its part of every batch; the parts
            together are the batch, and an empty one is left out.

    Raises:
        ValueError: `flip` is neither.
        DataError: from the iteration, naming a picture that cannot be read.
        RuntimeError: from an iteration that goes on after another one has begun.
    """

    def __init__(
        self,
        part: PictureSet,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        image_size: int,
        resize_size: int,
        device: torch.device | str = "cpu",
        workers: int = 0,
        augment: bool = False,
        seed: int = 0,
        flip: FlipName = "random",
        cutout: int = 0,
        channels_last: bool = True,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        expect_flip(flip)
        super().__init__(part, batch_size, share)
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.device = torch.device(device)
        self.augment = augment
        self.seed = seed
        self.flip = flip
        self.cutout = cutout
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.image_size = image_size
        transform = (
            training_transform(image_size, flip)
            if augment
            else evaluation_transform(image_size, resize_size)
        )
        workers = min(workers, len(self))
        self._workers = _Workers(workers)
        self._places: list[list[tuple[int, int, bool]]] = []  # what is read, batch by batch
        self._loader = DataLoader(
            _Reader(part.paths, transform, seed),
            batch_sampler=self._places,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_stack,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=self._workers.begin if workers else None,
            generator=torch.Generator(),  # its draw for the workers is not taken from torch's own
        )
        self._iteration = 0

    def iterate(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.part)
        order, flips = torch.arange(n), torch.zeros(n, dtype=torch.bool)
        if self.augment:
            draw = generator(EPOCH, self.seed, self.epoch)
            order = torch.randperm(n, generator=draw)
            row, column = torch.randint(self.image_size, (2, n), generator=draw).to(self.device)
            if self.flip == "alternating":
                flips = alternating_flips(n, self.seed, self.epoch)[order]
        batches = self.places(first)
        drawn = zip(order.tolist(), flips.tolist(), strict=True)
        read = [(self.epoch, i, flip) for i, flip in drawn]
        self._places[:] = [read[batch] for batch in batches]
        self._iteration += 1
        this, loaded = self._iteration, iter(self._loader)
        if self._iteration == 1 and isinstance(loaded, _MultiProcessingDataLoaderIter):
            self._workers.end_with(loaded, loaded._workers)
        for batch in batches:
            if self._iteration != this:
                raise RuntimeError("another iteration of these batches has begun")
            pictures = next(loaded)
            if isinstance(pictures, DataError):
                raise pictures
            images = pictures.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            labels = self.part.labels[order[batch]].to(self.device, non_blocking=True)
            images = normalize(images, self.mean, self.std)
            if self.augment and self.cutout:
                cutout(images, row[batch], column[batch], self.cutout)
            yield images.contiguous(memory_format=self.layout), labels

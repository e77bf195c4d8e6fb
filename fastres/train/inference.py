"""What a checkpoint is for: its accuracy on a data set, and the classes of image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastres.data import Batches, DataError, ImageSet, PictureBatches, PictureSet, load, normalize
from fastres.data.folder import MAX_NAMED, SUFFIXES, evaluation_transform, read_picture
from fastres.train import checkpoint
from fastres.train.config import EvalConfig, PredictConfig
from fastres.train.errors import CheckpointError, ImageError
from fastres.train.loop import evaluate
from fastres.train.meter import Meter
from fastres.train.model import build_model, resolve_device
from fastres.train.outcomes import Outcomes
from fastres.train.parts import test_part, worker_count
from fastres.train.run import MODEL_KEYS


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image and their softmax probabilities, likeliest first."""

    image: Path
    classes: tuple[tuple[str, float], ...]


def load_model(
    path: Path, *, device: torch.device | str = "cpu", fused: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint in evaluation mode, and the checkpoint's other content.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
    """
    content = checkpoint.load(path, MODEL_KEYS)
    model = build_model(content["model_name"], {**content["model_arguments"], "fused": fused})
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {content['model_name']}: {error}") from error
    return model.to(device).to(memory_format=torch.channels_last).eval(), content


def evaluate_checkpoint(config: EvalConfig) -> tuple[str, Meter, Outcomes]:
    """The data set's name, loss and accuracy on its test part, and the answer to each image.

    Raises:
        ConfigError, CheckpointError, DataError: what was asked for cannot be had.
    """
    device = resolve_device(config.device)
    model, content = load_model(config.checkpoint, device=device, fused=config.fused)
    name = config.data or content["data"]
    dataset = load(name, config.root)
    if list(dataset.classes) != content["classes"]:
        raise DataError(f"{name} has other classes than {config.checkpoint} was trained on")
    part = test_part(dataset, content["split"])
    size = content["image_size"]
    if isinstance(part, ImageSet) and part.images.shape[-1] != size:
        raise DataError(
            f"{name} has images of {part.images.shape[-1]} pixels, but {config.checkpoint} was "
            f"trained on {size}"
        )
    common = (config.batch_size, content["mean"], content["std"])
    if isinstance(part, PictureSet):
        batches: Batches | PictureBatches = PictureBatches(
            part,
            *common,
            image_size=size,
            resize_size=content["resize_size"],
            device=device,
            workers=worker_count(config.workers),
        )
    else:
        batches = Batches(part.to(device), *common)
    outcomes = Outcomes(dataset.classes)
    return name, evaluate(model, batches, on_batch=outcomes.add), outcomes


def read_image(path: Path, image_size: int, resize_size: int) -> Tensor:
    """The middle square of an image file, as evaluation sees it: (1, 3, H, W) uint8.

    Args:
        path: of the file.
        image_size: height and width of the square, in pixels.
        resize_size: what the shorter side is resized to before, in pixels.

    Raises:
        ImageError: the file is missing or is no image that Pillow can read.
    """
    try:
        picture = read_picture(path)
    except DataError as error:
        raise ImageError(str(error)) from error
    pixels: Tensor = evaluation_transform(image_size, resize_size)(picture)
    return pixels[None]


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths`, and those in its folders and their folders that are images by name.

    Names that begin with a dot are left out of folders.

    Raises:
        ImageError: there is no such file or folder, or a folder has no image in it.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise ImageError(f"no image at {path}")
            found.append(path)
        elif inside := list(_images_in(path)):
            found += inside
        else:
            raise ImageError(f"no image in the folder {path}: expected {', '.join(SUFFIXES)}")
    return found


def _images_in(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images_in(entry)
        elif entry.suffix.lower() in SUFFIXES:
            yield entry


@torch.inference_mode()
def predict(config: PredictConfig) -> list[Prediction]:
    """The classes of each image file, and of each in a folder.

    Raises:
        ConfigError, CheckpointError: what was asked for cannot be had.
        ImageError: files are missing or cannot be read; it names them.
    """
    device = resolve_device(config.device)
    paths = find_images(config.images)
    model, content = load_model(config.checkpoint, device=device, fused=config.fused)
    sizes = content["image_size"], content["resize_size"]
    predictions: list[Prediction] = []
    faults: list[str] = []
    for start in range(0, len(paths), config.batch_size):
        part, images = paths[start : start + config.batch_size], []
        for path in part:
            try:
                images.append(read_image(path, *sizes))
            except ImageError as error:
                faults.append(str(error))
        if faults:
            continue  # the others are still read, to name every fault at once
        batch = torch.cat(images).to(device).contiguous(memory_format=torch.channels_last)
        logits = model(normalize(batch, content["mean"], content["std"]))
        top = logits.softmax(1).topk(min(config.top, len(content["classes"])))
        for path, index, share in zip(part, top.indices.tolist(), top.values.tolist(), strict=True):
            names = (content["classes"][i] for i in index)
            predictions.append(Prediction(path, tuple(zip(names, share, strict=True))))
    if faults:
        rest = f"; and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
        raise ImageError("; ".join(faults[:MAX_NAMED]) + rest)
    return predictions

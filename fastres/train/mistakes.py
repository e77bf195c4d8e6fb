"""What the test part taught: which classes are confused, and the images that are most wrong."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastres.data import PictureSet
from fastres.data.folder import evaluation_transform, read_picture, resize_size
from fastres.train.files import write_atomically, write_json
from fastres.train.outcomes import Outcomes
from fastres.train.parts import Part
from fastres.train.run_folder import RunFolder

MOST_WRONG = 24
LARGEST_THUMBNAIL = 96  # pixels a side
MOST_NUMBERS = 20  # classes up to which a confusion matrix has room for its numbers


def write_mistakes(folder: RunFolder, outcomes: Outcomes, part: Part, image_size: int) -> None:
    """Write confusion.png, wrongest.png and test.json, which holds what both are made of.

    Args:
        folder: of the run.
        outcomes: the answers to the images of `part`, in their order.
        part: the test part.
        image_size: height and width of an image as the model gets it, in pixels.
    """
    confusion = outcomes.confusion()
    tiles = [
        (_thumbnail(part, position, image_size), _mistake(outcomes, part, position))
        for position in outcomes.wrongest(MOST_WRONG)
    ]
    draw_confusion(folder.confusion, confusion, outcomes.classes)
    draw_wrongest(folder.wrongest, tiles)
    content = {
        "classes": list(outcomes.classes),
        "confusion": confusion.tolist(),
        "wrongest": [{**mistake, "png": _as_text(thumbnail)} for thumbnail, mistake in tiles],
    }
    write_json(folder.test, content)


def _mistake(outcomes: Outcomes, part: Part, position: int) -> dict[str, Any]:
    """What test.json says of an image: where it is, what it is, what the model took it for."""
    return {
        "image": part.paths[position] if isinstance(part, PictureSet) else f"test {position}",
        "label": outcomes.classes[int(outcomes.labels[position])],
        "predicted": outcomes.classes[int(outcomes.predicted[position])],
        "probability": float(outcomes.shares[position]),
        "loss": float(outcomes.losses[position]),
    }


def _thumbnail(part: Part, position: int, image_size: int) -> Image.Image:
    """An image as the model saw it, made smaller if it is large."""
    if isinstance(part, PictureSet):
        transform = evaluation_transform(image_size, resize_size(image_size))
        pixels: Tensor = transform(read_picture(part.paths[position]))
    else:
        pixels = part.images[position]
    image = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    image.thumbnail((LARGEST_THUMBNAIL, LARGEST_THUMBNAIL))
    return image


def _as_text(image: Image.Image) -> str:
    """A PNG in base64."""
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def draw_confusion(path: Path, confusion: Tensor, classes: tuple[str, ...]) -> None:
    """Write a PNG of how many images of a class (row) got a class (column), atomically.

    Colours are shares of the row. Numbers are left out where they would not fit.
    """
    # Imported here: half a second, which no other command should wait for.
    from matplotlib.figure import Figure

    n = len(classes)
    side = min(max(5.0, 0.55 * n + 2), 16.0)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    every = max(1, n // 50)  # so many names fit along a side
    positions = range(0, n, every)
    names = [classes[position] for position in positions]
    axes.set_xticks(positions, names, rotation=90, fontsize=9)
    axes.set_yticks(positions, names, fontsize=9)
    axes.set(xlabel="predicted", ylabel="class")
    if n <= MOST_NUMBERS:
        for row, counts in enumerate(confusion.tolist()):
            for column, count in enumerate(counts):
                if count:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(
                        column, row, str(count), ha="center", va="center", color=colour, fontsize=8
                    )
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def draw_wrongest(path: Path, tiles: list[tuple[Image.Image, dict[str, Any]]]) -> None:
    """Write a PNG of images with what they were taken for and what they are, atomically."""
    columns, side, gap, text = 6, LARGEST_THUMBNAIL, 12, 34
    width = side + 44  # room for names longer than the image is wide
    rows = max(1, -(-len(tiles) // columns))
    size = (columns * (width + gap) + gap, rows * (side + text + gap) + gap)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(12)
    if not tiles:
        pen.text((gap, gap), "no test image has a wrong class", fill="black", font=font)
    for number, (thumbnail, mistake) in enumerate(tiles):
        row, column = divmod(number, columns)
        left, top = gap + column * (width + gap), gap + row * (side + text + gap)
        scale = max(1, side // max(thumbnail.size))
        shown = thumbnail.resize(
            (thumbnail.width * scale, thumbnail.height * scale), Image.Resampling.NEAREST
        )
        page.paste(shown, (left, top))
        for line, words in enumerate(
            (f"{mistake['predicted']} {mistake['probability']:.0%}", f"is {mistake['label']}")
        ):
            colour = "firebrick" if line == 0 else "black"
            words = _shortened(words, font, width)
            pen.text((left, top + side + 2 + 15 * line), words, fill=colour, font=font)
    write_atomically(path, lambda file: page.save(file, format="PNG"))


def _shortened(words: str, font: Any, width: int) -> str:
    """`words`, or as much of them as `width` pixels hold."""
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(words + "…") > width:
        words = words[:-1]
    return words + "…"

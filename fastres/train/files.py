"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fastres.train.errors import WriteError


def temporary_name(path: Path) -> Path:
    """What the file at `path` is called while it is written."""
    return path.with_name(f".{path.name}.tmp")


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], *, keep: Path | None = None
) -> None:
    """Let `write` fill a file beside `path`, then put it in `path`'s place in one step.

    A process killed at any time leaves the old file or the new one, never a part; with `keep`, to
    which the old file is moved, it may leave the old one there and none at `path`. After an error
    (of `write`, or because the disk is full) there is the old file and nothing else.

    Raises:
        WriteError: the disk is full, or takes the file for another reason not.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save puts an error of its own over the file's.
        cause = error.__context__ if type(error) is RuntimeError else error
        if isinstance(cause, OSError):
            raise WriteError(path, cause) from error
        raise
    # The rename itself must reach the disk too, or a power cut could undo it.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Write `content` atomically as indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")

"""Checkpoints: written atomically, read without running code from them."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastres.train.errors import CheckpointError
from fastres.train.files import write_atomically

FORMAT = 1


def previous(path: Path) -> Path:
    """Where `save` keeps the checkpoint that stood at `path` before: X.previous.pt for X.pt."""
    return path.with_suffix(f".previous{path.suffix}")


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` (tensors and plain Python values) to `path` atomically; see `previous`.

    Raises:
        WriteError: the disk is full, for one; both files are as they were.
    """
    write_atomically(
        path, lambda file: torch.save({"format": FORMAT, **content}, file), keep=previous(path)
    )


def load_or_previous(path: Path, keys: frozenset[str]) -> tuple[dict[str, Any], str | None]:
    """What `load` returns of `path`, or else of the one before it, and then why.

    Raises:
        CheckpointError: neither can be used.
    """
    try:
        return load(path, keys), None
    except CheckpointError as error:
        if not previous(path).exists():
            raise
        try:
            return load(previous(path), keys), f"{error}; going on from {previous(path)}"
        except CheckpointError as second:
            raise CheckpointError(f"{error}; and {second}") from error


def load(path: Path, keys: frozenset[str]) -> dict[str, Any]:
    """What `save` wrote, on the CPU.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it lacks one of `keys`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()  # torch writes checksums, but compares none
        if wrong is not None:
            raise zipfile.BadZipFile(f"the checksum of {wrong} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {path}") from error
    except Exception as error:  # zip, pickle and torch each have errors of their own for damage
        raise CheckpointError(
            f"{path} is damaged or no checkpoint of fastres: {why_unreadable(error)}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this version of fastres")
    if missing := sorted(keys - content.keys()):
        raise CheckpointError(f"{path} lacks {', '.join(missing)}: it cannot be used for this")
    return content


def why_unreadable(error: Exception) -> str:
    """What kept torch.load from reading a file, in one line."""
    # The first advises to load what may run code, the second is a number.
    if isinstance(error, pickle.UnpicklingError | LookupError):
        return "expected a file of tensors and plain values"
    return str(error).splitlines()[0] if str(error) else type(error).__name__

"""Where the library of the ops is, for programs without Python."""

from __future__ import annotations

from pathlib import Path

from fastres import _C


def library_path() -> Path:
    """Return the path of libfastres.so, which has the ops and needs torch's libraries alone.

    A C++ program that loads it (``dlopen``) or links to it can run scripted models that have the
    ops in them, on the CPU; in Python ``import fastres`` has loaded it already. It works with
    every torch from 2.10 on. examples/cpp shows how.
    """
    return Path(_C.__file__).with_name("libfastres.so")

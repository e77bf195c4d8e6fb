"""The C++ example: the commands of its README build it, and it gives Python's answer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastres

ROOT = Path(__file__).parent.parent
COMPILERS = (os.environ.get("CXX", ""), "c++", "g++", "clang++")

pytestmark = [
    pytest.mark.skipif(shutil.which("cmake") is None, reason="no CMake: pip install cmake"),
    pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the README's commands have been run, to the last."""
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "examples").symlink_to(ROOT / "examples")
    text = (ROOT / "examples/cpp/README.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"^```sh\n(.*?)^```", text, flags=re.S | re.M)
    done = subprocess.run(
        ["bash", "-ec", commands],
        cwd=folder,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder / "build/cpp"


def run_model(built: Path, library: Path, expected: Path) -> subprocess.CompletedProcess[str]:
    command = [built / "run_model", library, built / "model.pt", expected]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.fits_in("a C++ program with torch's libraries alone", "Compilers and exporters")
def test_it_gives_the_logits_that_python_got(built: Path) -> None:
    done = run_model(built, fastres.library_path(), built / "expected.pt")
    assert done.returncode == 0, done.stderr
    assert "logits [4, 10], relative error " in done.stdout


def test_other_logits_are_told_by_the_exit_status(built: Path) -> None:
    expected = torch.load(built / "expected.pt")
    expected["logits"][2, 3] += 1e-3
    torch.save(expected, built / "other.pt")
    done = run_model(built, fastres.library_path(), built / "other.pt")
    assert done.returncode == 1, done.stderr


def test_the_model_needs_the_library(built: Path) -> None:
    done = run_model(built, Path("none.so"), built / "expected.pt")
    assert done.returncode == 2
    assert "cannot load fastres: none.so" in done.stderr
    plain = torch.__path__[0] + "/lib/libtorch_cpu.so"
    done = run_model(built, Path(plain), built / "expected.pt")
    assert done.returncode == 2
    assert "Unknown builtin op: fastres::" in done.stderr

"""The README's commands and Python snippets run as they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


def test_two_commands_set_everything_up() -> None:
    """.ci/run runs these two, in a fresh virtual environment."""
    setups = [line for line in commands() if line.startswith("pip install -e")]
    assert setups == [
        "pip install -e . && fastres train --data sample --epochs 3",
        "pip install -e '.[test]' && pytest",
    ]


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_snippet(number: int, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", blocks("python")[number]], cwd=tmp_path, check=True)


def own_commands() -> list[str]:
    """The commands of fastres, from training to prediction, in the README's order."""
    return [line for line in commands() if line.startswith(("fastres ", "python -m fastres"))]


@pytest.mark.slow
def test_commands_of_fastres_in_their_order(tmp_path: Path) -> None:
    """In one folder, each with what the commands before it left there."""
    from torchvision.io import write_png

    from fastres import data

    picture = data.sample().test.images[0]
    write_png(picture.contiguous(), str(tmp_path / "cat.png"))
    assert own_commands()
    for line in own_commands():
        words = shlex.split(line)
        words = words[3:] if words[0] == "python" else words[1:]
        done = subprocess.run(
            [sys.executable, "-m", "fastres", *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_commands_of_the_benches_exist() -> None:
    """The benches' commands themselves run in .ci/run, in quick mode."""
    for line in commands():
        for word in shlex.split(line):
            if word.startswith("bench/"):
                assert (ROOT / word).exists(), line


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert (ROOT / target).exists(), target

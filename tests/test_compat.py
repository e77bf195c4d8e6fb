"""tools/compat.py: versions, counts, table and errors; uv is played by a script here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import compat
from compat import Cell, CompatError

VERSIONS = {
    "python": "3.12.1",
    "torch": "2.10.0",
    "torchvision": "0.25.0",
    "triton": "3.6.0",
    "numpy": "2.4.6",
    "built with": "gcc 12.2.0, torch 2.15.0",
}
# Environments are this test's own Python, and say that they have VERSIONS; torch 8.9 does not
# exist.
UV = """#!{python}
import json, os, pathlib, platform, sys
words = sys.argv[1:]
if words[:2] == ["python", "list"]:
    plain = {{"implementation": "cpython", "variant": "default", "path": sys.executable}}
    free_threaded = {{**plain, "variant": "freethreaded", "version": "3.99.0"}}
    beta = {{**plain, "version": "3.98.0b1"}}
    print(json.dumps([free_threaded, beta, {{**plain, "version": platform.python_version()}}]))
elif words[:2] == ["pip", "compile"]:
    lowest = words[words.index("--resolution") + 1] == "lowest-direct"
    print("torch==8.8.0" if lowest else "torch==8.9.1")
elif words[0] == "venv":
    python = pathlib.Path(words[-1]) / "bin/python"
    python.parent.mkdir(parents=True, exist_ok=True)
    versions = '[ "$2" = -c ] && exec cat "$0.versions"'
    python.write_text("#!/bin/sh\\n" + versions + "\\nexec {python} \\"$@\\"\\n")
    (python.parent / "python.versions").write_text({versions!r})
    python.chmod(0o755)
elif "FASTRES_LIBRARY" in os.environ:
    built = pathlib.Path(os.environ["UV_BUILT"])
    built.write_bytes(pathlib.Path(os.environ["FASTRES_LIBRARY"]).read_bytes())
elif words[-1] == "torch==8.9.*":
    sys.exit("error: No solution found when resolving dependencies\\n  there is no\\n  torch 8.9")
elif words[-1] == "torch==7.0.*":
    sys.exit("error: the network is down")
"""


def write_wheel(path: Path, library: str = "a binary") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "fastres-1.dist-info/METADATA",
            "Name: fastres\nRequires-Python: >=3.10\n"
            "Requires-Dist: torchvision\nRequires-Dist: torch>=2.10\n",
        )
        archive.writestr("fastres/libfastres.so", library)
    return path


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel for this Python."""
    tag = compat.minor_of(sys.version).replace(".", "")
    return write_wheel(tmp_path / f"fastres-1-cp{tag}-cp{tag}-linux_x86_64.whl")


@pytest.fixture
def uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "bin/uv"
    script.parent.mkdir()
    script.write_text(UV.format(python=sys.executable, versions=json.dumps(VERSIONS)))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose only tests are one of each outcome."""
    folder = tmp_path / "root"
    (folder / "tests").mkdir(parents=True)
    (folder / "fastres").mkdir()
    (folder / "fastres/__init__.py").write_text("raise ImportError('the checkout, not the wheel')")
    (folder / "tests/test_tiny.py").write_text(
        "import pytest, sys\n"
        "assert 'fastres' not in [p.name for p in __import__('pathlib').Path().iterdir()]\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 0\n"
        "def test_skips(): pytest.skip('so')\n"
        "def test_errs(nothing): pass\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_more(n): pass\n"
    )
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    monkeypatch.setattr(compat, "ROOT", folder)
    return folder


@pytest.mark.parametrize(
    ("oldest", "newest", "versions"),
    [
        ("2.10.0", "2.15.0", ["2.10", "2.13", "2.15"]),
        ("2.9.1", "2.10.0", ["2.9", "2.10"]),
        ("2.10.0", "2.10.2", ["2.10"]),
    ],
)
def test_oldest_middle_and_newest(oldest: str, newest: str, versions: list[str]) -> None:
    assert compat.between(oldest, newest) == versions


def test_nothing_lies_between_two_major_versions() -> None:
    with pytest.raises(CompatError, match=r"--torch: .* between 2\.10\.0 and 3\.0\.0"):
        compat.between("2.10.0", "3.0.0")


def test_a_wheel_says_what_it_needs(wheel: Path, tmp_path: Path) -> None:
    read = compat.read_wheel(wheel)
    assert (read.requires_python, read.requires_torch) == (">=3.10", "torch>=2.10")
    (tmp_path / "no.whl").write_text("no")
    for path in (tmp_path / "no.whl", tmp_path / "missing.whl"):
        with pytest.raises(CompatError, match=f"--wheel: {path} is no wheel of fastres"):
            compat.read_wheel(path)


def test_the_table_has_every_pair_in_order() -> None:
    found = {"versions": VERSIONS, "tests": ["test_ops"], "device": "CPU", "commit": "a" * 40}
    cells = [
        Cell("3.12", "2.10", passed=5, skipped=1, date="2026-11-23T01:02:03", **found),
        Cell("3.9", "2.10", unavailable="there is none"),
        Cell("3.12", "2.9", passed=4, failed=["tests.test_ops::test_a"], select="not a", **found),
    ]
    content = {
        "wheel": {"name": "fastres-0.1.0-cp312-cp312-linux_x86_64.whl", "sha256": "0"},
        "cells": [asdict(cell) for cell in cells],
        "aarch64": asdict(Cell("3.12", "2.9", passed=2)),
    }
    lines = compat.table(content).splitlines()
    assert "| | torch 2.9 | torch 2.10 |" in lines
    assert lines.index("| Python 3.9 | not run | no packages |") + 1 == lines.index(
        "| Python 3.12 | 4 passed, **1 failed** | 5 passed, 1 skipped |"
    )
    assert "* Python 3.9, torch 2.10: there is none" in lines
    assert "* Python 3.12, torch 2.9: `tests.test_ops::test_a`" in lines
    environment = "| 3.12.1 | 2.10.0 | 0.25.0 | 3.6.0 | 2.4.6 | ops | 2026-11-23 | aaaaaaaa |"
    assert environment in lines
    assert any("| ops (`-k 'not a'`) |" in line for line in lines)
    assert any("-linux_x86_64.whl` (built with gcc 12.2.0, torch 2.15.0)" in line for line in lines)
    assert any(line.startswith("aarch64") and line.endswith(": 2 passed.") for line in lines)


@pytest.mark.usefixtures("uv")
def test_runs_add_up_for_one_wheel(
    checkout: Path, wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, table = tmp_path / "compat.json", tmp_path / "compat.md"
    common = [f"--wheel={wheel}", f"--results={results}", f"--table={table}", "--tests=test_tiny"]
    minor = compat.minor_of(sys.version.split()[0])

    assert compat.main([*common, "--torch", "8.8"]) == 1  # a test failed
    (cell,) = json.loads(results.read_text())["cells"]
    assert (cell["python"], cell["torch"], cell["tests"]) == (minor, "8.8", ["test_tiny"])
    assert (cell["passed"], cell["skipped"]) == (3, 1)
    assert cell["failed"] == ["tests.test_tiny::test_fails", "tests.test_tiny::test_errs"]
    assert cell["versions"] == VERSIONS

    (checkout / "tests/test_tiny.py").write_text("def test_passes(): pass\n")
    (checkout / "tests/test_portability.py").write_text("def test_compiles(): pass\n")
    # torch 8.8, the oldest, and 8.9, the newest, which cannot be had
    assert compat.main([*common, "--select", "passes"]) == 0
    old, new = json.loads(results.read_text())["cells"]
    assert (old["torch"], old["passed"], old["failed"]) == ("8.8", 1, [])
    assert new["unavailable"] == (
        "No solution found when resolving dependencies there is no torch 8.9"
    )
    assert f"| Python {minor} | 1 passed | no packages |" in table.read_text()

    assert compat.main([*common, "--torch", "8.8", "--aarch64"]) == 0
    content = json.loads(results.read_text())
    assert (len(content["cells"]), content["aarch64"]["passed"]) == (2, 1)

    before = results.read_text()
    assert compat.main([*common, "--torch", "7.0"]) == 2
    assert "compat: uv pip failed: error: the network is down" in capsys.readouterr().err
    assert results.read_text() == before

    (checkout / "tests/test_tiny.py").write_text("import os\nos._exit(7)\n")
    write_wheel(wheel, "another binary")
    assert compat.main([*common, "--torch", "8.8"]) == 1
    (cell,) = json.loads(results.read_text())["cells"]
    assert cell["failed"] == ["pytest ended with status 7: no output"]


@pytest.mark.usefixtures("uv", "checkout")
def test_another_python_gets_the_same_library(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tmp_path / "built"
    monkeypatch.setenv("UV_BUILT", str(built))
    common = [f"--results={tmp_path / 'compat.json'}", f"--table={tmp_path / 'compat.md'}"]
    common += ["--tests=test_tiny", "--torch=8.8"]
    compat.main([f"--wheel={wheel}", *common])
    assert not built.exists()
    other = wheel.rename(tmp_path / "fastres-1-cp39-cp39-linux_x86_64.whl")
    compat.main([f"--wheel={other}", *common])
    assert built.read_text() == "a binary"


def test_a_module_is_built_with_what_the_package_is() -> None:
    requires = (compat.ROOT / "pyproject.toml").read_text().splitlines()[1]
    assert requires == f"requires = {json.dumps(list(compat.BUILDS_WITH))}"


@pytest.mark.usefixtures("uv")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--torch", "2.10.0"], "--torch: '2.10.0' is no version: expected one such as 2.10"),
        (["--tests", "test_nothing"], "--tests: there is no tests/test_nothing.py"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        compat.main(arguments)
    assert message in capsys.readouterr().err


def test_a_missing_uv_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SystemExit, match="2"):
        compat.main([])
    assert "was not found: pip install uv" in capsys.readouterr().err


@pytest.mark.usefixtures("uv")
def test_a_python_that_does_not_run_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert compat.main(["--python", "/nonexistent/python"]) == 2
    assert "--python: '/nonexistent/python' is no Python that runs" in capsys.readouterr().err

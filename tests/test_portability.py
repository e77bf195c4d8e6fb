"""The C++ sources compile for aarch64, and their loops become NEON's multiply-adds.

The cross compiler is the one that FASTRES_AARCH64_CXX names (with its options), else
aarch64-linux-gnu-g++ or the package ziglang, whichever is there.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.cpp"))


def cross_compiler() -> list[str] | None:
    """The command of a C++ compiler for aarch64 Linux, or None."""
    if named := os.environ.get("FASTRES_AARCH64_CXX"):
        return shlex.split(named)
    if path := shutil.which("aarch64-linux-gnu-g++"):
        return [path]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"]
    return None


pytestmark = pytest.mark.skipif(
    cross_compiler() is None,
    reason="no compiler for aarch64: pip install ziglang, or name one in FASTRES_AARCH64_CXX",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zig")


def compile_source(source: Path, output: Path, cache: Path, *flags: str) -> None:
    command = cross_compiler()
    assert command is not None
    run = subprocess.run(
        [
            *command,
            "-std=c++20",
            "-g0",
            "-fPIC",
            "-Wno-psabi",
            "-Icsrc",
            *flags,
            str(source),
            "-o",
            output,
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "ZIG_GLOBAL_CACHE_DIR": str(cache),
            "ZIG_LOCAL_CACHE_DIR": str(cache),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    warnings = [line for line in run.stderr.splitlines() if re.match(r"csrc/.+ warning:", line)]
    assert not warnings, run.stderr[-4000:]


def functions(assembly: str) -> dict[str, str]:
    """The text of every function, by its mangled name."""
    parts = re.split(r"^(_Z\w+):", assembly, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.fits_in("aarch64: the loops are NEON's multiply-adds", "Other machines")
def test_kernels_are_neon(tmp_path: Path, cache: Path) -> None:
    """Without torch's headers, of which the kernels include none."""
    flags = ("-S", "-O3", "-ffp-contract=fast", "-fno-math-errno")
    source = Path("csrc/cpu/kernels_baseline.cpp")
    compile_source(source, tmp_path / "kernels.s", cache, *flags)
    assembly = (tmp_path / "kernels.s").read_text()
    multiply_add = re.compile(r"\bfmla\s+v\d+\.4s")
    for loop in ("conv_tile", "winograd_store", "WinogradFloats"):
        found = [body for name, body in functions(assembly).items() if loop in name]
        assert any(len(multiply_add.findall(body)) >= 16 for body in found), loop
    # Next to no float is multiplied and added alone, and none by a call.
    assert len(multiply_add.findall(assembly)) > 100 * len(re.findall(r"\bfmadd\b", assembly))
    assert not re.search(r"\bbl\s+fmaf?\b", assembly)


@pytest.mark.fits_in("aarch64: every source compiles", "Other machines")
@pytest.mark.slow
def test_every_source_compiles(tmp_path: Path, cache: Path) -> None:
    import pybind11

    include = Path(torch.__file__).parent / "include"
    folders = [
        include,
        include / "torch/csrc/api/include",
        Path(pybind11.get_include()),
        Path(sysconfig.get_path("include")),
    ]
    flags = [f"-isystem{folder}" for folder in folders]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", '-DFASTRES_BUILT_WITH_TORCH="x"']
    assert SOURCES
    for source in SOURCES:
        output = tmp_path / source.with_suffix(".o").name
        compile_source(source, output, cache, "-c", "-O0", "-Wall", "-Wextra", *flags)
        elf = output.read_bytes()[:20]
        assert elf[:4] == b"\x7fELF" and elf[18:20] == b"\xb7\x00", source  # EM_AARCH64

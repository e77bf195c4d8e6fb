"""Run the tests with one library of kernels under several versions of Python and torch.

    python tools/compat.py [--python PATH ...] [--torch 2.10 ...] [--aarch64]

The wheel is built once. For every pair of a Python and a torch, uv makes a virtual environment
(under --work, removed afterwards), installs the wheel with that torch and the packages that fit,
and runs the tests there, where they see nothing of the checkout's own package. For another Python
than the wheel's, the small module in front of libfastres.so is compiled; the library is the same.
The results are kept in --results, and the table is written from them. Runs with the same --wheel
add up, so that a table can be filled in several runs; another library begins a new one.

A torch is several gigabytes: uv downloads each once. UV_TORCH_BACKEND=cpu takes the small ones,
without CUDA, from torch's own index.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass, field
from email import message_from_string
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Console

from fastres.train.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from harness import commit, device_name  # noqa: E402

# What a change of Python or torch can break, in a few minutes: binary, dispatcher, autograd,
# compiler, TorchScript, export, training and its checkpoints, and Triton's code for GPUs.
TESTS = (
    "test_backends",
    "test_ops",
    "test_nn",
    "test_models",
    "test_torchscript",
    "test_train",
    "test_triton_compile",
)
# What the environments do not get from the checkout: they have the wheel's.
PACKAGES = ("fastres", "kernels")
# What pyproject.toml has the package built with.
BUILDS_WITH = ("setuptools>=77", "ninja>=1.11", "pybind11>=2.13")
RESULTS = ROOT / "docs/compat.json"
TABLE = ROOT / "docs/compat.md"
NO_SOLUTION = "No solution found"


class CompatError(Exception):
    """What the user has to know instead of a result."""


class NoSolutionError(Exception):
    """No set of packages has this torch for this Python."""


@dataclass(frozen=True)
class Interpreter:
    """A Python on this machine: its version, such as 3.12.1, and where it is."""

    version: str
    path: str

    @property
    def minor(self) -> str:
        return minor_of(self.version)


@dataclass(frozen=True)
class Wheel:
    """A wheel: its file, its libfastres.so, and what its metadata ask for."""

    path: Path
    library: bytes
    requires_python: str
    requires_torch: str

    @property
    def sha256(self) -> str:
        """The library's."""
        return hashlib.sha256(self.library).hexdigest()

    def serves(self, python: Interpreter) -> bool:
        """Whether the module in front of the library is for this Python."""
        return is_for(self.path.name, python.minor)


@dataclass
class Cell:
    """What the tests gave in one environment.

    Attributes:
        python, torch: the versions asked for, such as 3.12 and 2.10.
        passed, skipped: numbers of tests.
        failed: the tests that failed, or what kept them from running.
        unavailable: why there is no such environment; empty where there is one.
        versions: of Python and the packages, as `fastres env` has them.
        tests, select: the test files, and pytest's -k among their tests ("": all).
        device, commit, date: the processor, the checkout, and when.
    """

    python: str
    torch: str
    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    unavailable: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    tests: list[str] = field(default_factory=list)
    select: str = ""
    device: str = ""
    commit: str | None = None
    date: str = ""


def numbers(version: str) -> tuple[int, ...]:
    """Major and minor version as integers, by which versions are in order."""
    return tuple(int(part) for part in version.split(".")[:2])


def is_for(wheel: str, python: str) -> bool:
    """Whether the wheel of this name is this Python's, such as 3.12."""
    return f"-cp{python.replace('.', '')}-" in wheel


def minor_of(version: str) -> str:
    return ".".join(version.split(".")[:2])


def between(oldest: str, newest: str) -> list[str]:
    """The oldest version, the middle one and the newest, such as ["2.10", "2.13", "2.15"]."""
    (major, low), (last_major, high) = numbers(oldest), numbers(newest)
    if major != last_major:
        raise CompatError(
            f"--torch: nothing is known to lie between {oldest} and {newest}: name the versions"
        )
    return [f"{major}.{minor}" for minor in sorted({low, (low + high + 1) // 2, high})]


def read_wheel(path: Path) -> Wheel:
    """A wheel's library and requirements."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            metadata = message_from_string(archive.read(name).decode())
            library = archive.read("fastres/libfastres.so")
    except (OSError, zipfile.BadZipFile, StopIteration, KeyError) as error:
        raise CompatError(f"--wheel: {path} is no wheel of fastres: {error}") from error
    required = [r for r in metadata.get_all("Requires-Dist", []) if re.match(r"torch\b(?!v)", r)]
    return Wheel(
        path=path.resolve(),
        library=library,
        requires_python=metadata["Requires-Python"],
        requires_torch=required[0],
    )


def read_junit(path: Path) -> tuple[int, int, list[str]]:
    """Tests passed, skipped, and the names of those that failed, of pytest's --junitxml."""
    passed, skipped, failed = 0, 0, []
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, skipped, failed


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")


def environment(**variables: str) -> dict[str, str]:
    """This process's environment, without what would lead Python to other packages."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {k: v for k, v in os.environ.items() if k not in hidden} | variables


def uv(*arguments: str, **variables: str) -> str:
    """What uv prints."""
    run = subprocess.run(
        ["uv", *arguments],
        env=environment(UV_PYTHON_DOWNLOADS="never", **variables),
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        # uv wraps its lines for a terminal.
        text = " ".join(run.stderr.split())
        if NO_SOLUTION in text:
            raise NoSolutionError(text[text.index(NO_SOLUTION) :])
        raise CompatError(f"uv {arguments[0]} failed: {text[-2000:]}")
    return run.stdout


def find_interpreters(requires: str) -> list[Interpreter]:
    """One CPython of every minor version that `requires` takes, on PATH or installed by pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    folders = [str(folder) for folder in sorted(pyenv.glob("versions/*/bin"))]
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    listed = uv("python", "list", "--only-installed", "--output-format=json", requires, PATH=path)
    found: dict[tuple[int, ...], Interpreter] = {}
    for entry in json.loads(listed):
        plain = entry["implementation"] == "cpython" and entry["variant"] == "default"
        if plain and re.fullmatch(r"[\d.]+", entry["version"]):
            # The first of a minor version is the newest.
            found.setdefault(
                numbers(entry["version"]), Interpreter(entry["version"], entry["path"])
            )
    return [found[key] for key in sorted(found)]


def interpreter(path: str) -> Interpreter:
    """The Python that the user named."""
    script = "import platform; print(platform.python_version())"
    try:
        run = subprocess.run([path, "-I", "-c", script], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompatError(f"--python: {path!r} is no Python that runs: {error}") from error
    return Interpreter(run.stdout.strip(), shutil.which(path) or path)


def default_torches(wheel: Wheel, interpreters: list[Interpreter]) -> list[str]:
    """The oldest torch that the wheel takes, the middle one, and the newest on the index."""

    def resolved(python: Interpreter, resolution: str) -> str:
        with tempfile.NamedTemporaryFile("w", suffix=".in") as file:
            file.write(wheel.requires_torch)
            file.flush()
            arguments = ("--no-header", "--no-annotate", "--no-deps", "--resolution", resolution)
            pinned = uv("pip", "compile", file.name, "--python", python.path, *arguments)
        return re.findall(r"^torch==(\S+)", pinned, re.M)[0]

    return between(
        resolved(interpreters[0], "lowest-direct"), resolved(interpreters[-1], "highest")
    )


def build_wheel(folder: Path) -> Path:
    """Build the checkout's wheel with this Python and its torch."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder)]
    if subprocess.run([*command, str(ROOT)], check=False).returncode != 0:
        raise CompatError("the wheel could not be built; the errors are above")
    return next(folder.glob("fastres-*.whl"))


def copy_checkout(folder: Path) -> None:
    """Everything but the package itself, so that only an installed one can be imported."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if name.split("/")[0] not in PACKAGES and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def make_environment(
    folder: Path, python: Interpreter, torch: str, wheel: Wheel, extras: str
) -> Path:
    """A virtual environment with the wheel's library and what it needs; its Python."""
    uv("venv", "--quiet", "--clear", "--python", python.path, str(folder))
    executable = folder / "bin/python"
    install = ("pip", "install", "--quiet", "--python", str(executable))
    if wheel.serves(python):
        uv(*install, f"fastres[{extras}] @ {wheel.path.as_uri()}", f"torch=={torch}.*")
        return executable
    library = folder / "libfastres.so"
    library.write_bytes(wheel.library)
    uv(*install, *BUILDS_WITH, f"torch=={torch}.*")
    # uv would take what it built from these files with another library.
    fresh = ("--no-build-isolation-package", "fastres", "--refresh-package", "fastres")
    source = f"fastres[{extras}] @ {ROOT.as_uri()}"
    uv(*install, *fresh, source, f"torch=={torch}.*", FASTRES_LIBRARY=str(library))
    return executable


def run_tests(python: Path, checkout: Path, cell: Cell) -> None:
    """Fill in the versions of an environment, and the results of the cell's tests in it."""
    script = "import json; from fastres import env; print(json.dumps(env.versions()))"
    probe = subprocess.run(
        [python, "-I", "-c", script], env=environment(), capture_output=True, text=True, check=False
    )
    if probe.returncode != 0:
        cell.failed = [f"import fastres: {last_line(probe.stderr)}"]
        return
    cell.versions = json.loads(probe.stdout)
    report = python.parent / "junit.xml"
    options = ("-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-k", cell.select)
    run = subprocess.run(
        [python, "-m", "pytest", *options, *(f"tests/{name}.py" for name in cell.tests)],
        cwd=checkout,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if run.returncode in (0, 1) and report.exists():
        cell.passed, cell.skipped, cell.failed = read_junit(report)
    else:
        cell.failed = [f"pytest ended with status {run.returncode}: {last_line(run.stdout)}"]
    if cell.failed:
        print(run.stdout)


def summary(cell: Cell) -> str:
    """A cell's words in the table."""
    if cell.unavailable:
        return "no packages"
    counts = f"{cell.passed} passed"
    if cell.skipped:
        counts += f", {cell.skipped} skipped"
    if cell.failed:
        counts += f", **{len(cell.failed)} failed**"
    return counts


def table(content: dict[str, Any]) -> str:
    """The results as a page of Markdown."""
    cells = [Cell(**cell) for cell in content["cells"]]
    torches = sorted({cell.torch for cell in cells}, key=numbers)
    pythons = sorted({cell.python for cell in cells}, key=numbers)
    at = {(cell.python, cell.torch): cell for cell in cells}
    wheel = content["wheel"]
    # Under another Python these words are of the module that was compiled for it.
    own = (cell for cell in cells if cell.versions and is_for(wheel["name"], cell.python))
    built = next((cell.versions["built with"] for cell in own), "nothing known")
    lines = [
        "# Pythons and torches that one library runs under",
        "",
        "Written by `python tools/compat.py`: the tests of the files named below, run with the",
        f"libfastres.so of one wheel, `{wheel['name']}` (built with {built}),",
        "under several versions of Python and torch.",
        "",
        "| | " + " | ".join(f"torch {torch}" for torch in torches) + " |",
        "|---|" + "---|" * len(torches),
    ]
    for python in pythons:
        row = [at.get((python, torch)) for torch in torches]
        words = [summary(cell) if cell else "not run" for cell in row]
        lines.append(f"| Python {python} | " + " | ".join(words) + " |")
    if aarch64 := content.get("aarch64"):
        cell = Cell(**aarch64)
        lines += [
            "",
            f"aarch64, cross-compiled, with NEON in the loops (test_portability): {summary(cell)}.",
        ]
    missing = [cell for cell in cells if cell.unavailable]
    if missing:
        lines += ["", "No packages:", ""]
        lines += [f"* Python {c.python}, torch {c.torch}: {c.unavailable}" for c in missing]
    failures = [cell for cell in cells if cell.failed]
    if failures:
        lines += ["", "Failed:", ""]
        lines += [
            f"* Python {c.python}, torch {c.torch}: `{t}`" for c in failures for t in c.failed
        ]
    lines += ["", "## The environments", ""]
    lines += ["| Python | torch | torchvision | triton | numpy | tests | date | commit |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for cell in sorted(cells, key=lambda c: (numbers(c.python), numbers(c.torch))):
        if cell.versions:
            names = ("python", "torch", "torchvision", "triton", "numpy")
            versions = " | ".join(cell.versions[name] for name in names)
            tests = ", ".join(name.removeprefix("test_") for name in cell.tests)
            if cell.select:
                tests += f" (`-k '{cell.select}'`)"
            lines.append(
                f"| {versions} | {tests} | {cell.date[:10]} | {(cell.commit or 'none')[:8]} |"
            )
    devices = sorted({cell.device for cell in cells if cell.device})
    return "\n".join([*lines, "", f"On {', '.join(devices)}.", ""])


def merged(content: dict[str, Any], wheel: Wheel) -> dict[str, Any]:
    """Earlier results where they are of the same library, else none."""
    if content.get("wheel", {}).get("sha256") == wheel.sha256:
        return content
    return {"wheel": {"name": wheel.path.name, "sha256": wheel.sha256}, "cells": []}


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--python", nargs="+", metavar="PATH", help="default: one of every version that is found")
    add("--torch", nargs="+", metavar="X.Y", help="default: the oldest, the middle and the newest")
    add(
        "--tests",
        nargs="+",
        default=list(TESTS),
        metavar="NAME",
        help=f"default: {' '.join(TESTS)}",
    )
    add("--select", default="", metavar="EXPRESSION", help="pytest's -k: only some of the tests")
    add("--aarch64", action="store_true", help="also cross-compile the C++ sources for aarch64")
    add("--wheel", type=Path, help="the binary; default: build it")
    add("--results", type=Path, default=RESULTS, help="JSON; default: docs/compat.json")
    add("--table", type=Path, default=TABLE, help="Markdown; default: docs/compat.md")
    add("--work", type=Path, help="folder for the environments; default: a temporary one")
    arguments = parser.parse_args(argv)
    for version in arguments.torch or []:
        if not re.fullmatch(r"\d+\.\d+", version):
            parser.error(f"--torch: {version!r} is no version: expected one such as 2.10")
    arguments.tests = [Path(name).stem for name in arguments.tests]
    for name in arguments.tests:
        if not (ROOT / "tests" / f"{name}.py").is_file():
            parser.error(f"--tests: there is no tests/{name}.py")
    if shutil.which("uv") is None:
        parser.error("uv makes the environments and was not found: pip install uv")
    return arguments


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Fill in a cell for every Python and torch, writing results and table after each."""
    console = Console()
    chosen = [interpreter(path) for path in arguments.python or []]
    wheel = read_wheel(arguments.wheel or build_wheel(work))
    pythons = chosen or find_interpreters(wheel.requires_python)
    torches = arguments.torch or default_torches(wheel, pythons)
    circumstances = {
        "device": device_name("cpu"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    checkout = work / "checkout"
    copy_checkout(checkout)
    earlier = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    content = merged(earlier, wheel)

    def cell_of(
        python: Interpreter, torch: str, extras: str, tests: list[str], select: str
    ) -> Cell:
        cell = Cell(python.minor, torch, tests=tests, select=select, **circumstances)
        folder = work / "environment"
        try:
            run_tests(make_environment(folder, python, torch, wheel, extras), checkout, cell)
        except NoSolutionError as error:
            cell.unavailable = str(error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        console.print(f"Python {cell.python}, torch {cell.torch}: {summary(cell)}")
        return cell

    def write() -> None:
        write_json(arguments.results, content)
        write_text(arguments.table, table(content))

    for torch in torches:
        for python in pythons:
            cell = cell_of(python, torch, "test", arguments.tests, arguments.select)
            others = [
                c for c in content["cells"] if (c["python"], c["torch"]) != (cell.python, torch)
            ]
            content["cells"] = [*others, asdict(cell)]
            write()
    if arguments.aarch64:
        cell = cell_of(pythons[-1], torches[-1], "test,cross", ["test_portability"], "")
        content["aarch64"] = asdict(cell)
        write()
    return content


def main(argv: list[str] | None = None) -> int:
    """Return 1 where a test failed."""
    arguments = arguments_of(argv)
    try:
        with tempfile.TemporaryDirectory(dir=arguments.work, prefix="compat-") as work:
            content = run(arguments, Path(work))
    except CompatError as error:
        print(f"compat: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.table}: written")
    cells = [*content["cells"], *filter(None, [content.get("aarch64")])]
    return 1 if any(cell["failed"] for cell in cells) else 0


if __name__ == "__main__":
    sys.exit(main())

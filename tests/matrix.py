"""docs/matrix.md: what a fused model fits in with, each row with the tick that its tests wrote.

A test with `@pytest.mark.fits_in(row, part)` is the row, or one of its tests, of the table under
the heading `part`. `pytest --write-matrix=docs/matrix.md` runs these tests and writes the page.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import pytest

import fastres
from fastres import _C

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "matrix.md"
PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime")
HEAD = """# What it fits in with

Each row is a test that fuses a model and compares it with the plain one (under Other machines,
that compiles the sources): a tick means that all that is compared was the same.
`pytest --write-matrix=docs/matrix.md` ran the tests and wrote this page. Versions of Python and
torch have [a page of their own](compat.md).
"""


class Row(NamedTuple):
    """A row of the page, without its tick."""

    part: str
    name: str
    test: str  # file::function

    @property
    def line(self) -> str:
        return f"{self.name} | `{self.test}` |"


def rows() -> list[Row]:
    """All rows, as they stand at the tests."""
    return [row for file in sorted(TESTS.glob("test_*.py")) for row in _rows_of(file)]


def _rows_of(file: Path) -> Iterator[Row]:
    if "fits_in(" not in file.read_text():
        return
    spec = importlib.util.spec_from_file_location(f"rows_of_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for test, name in _tests(module, file.name):
        for mark in getattr(test, "pytestmark", ()):
            parameters = mark.args[1] if mark.name == "parametrize" else ()
            of_parameters = (one for each in parameters for one in getattr(each, "marks", ()))
            for one in (mark, *of_parameters):
                if one.name == "fits_in":
                    yield Row(one.args[1], one.args[0], name)


def _tests(parent: Any, name: str) -> Iterator[tuple[Any, str]]:
    """The tests in a module, and in its classes, by pytest's names."""
    for child in vars(parent).values():
        child_name = f"{name}::{getattr(child, '__name__', '')}"
        if isinstance(child, FunctionType):
            yield child, child_name
        elif isinstance(child, type) and child.__name__.startswith("Test"):
            yield from _tests(child, child_name)


def page(ticks: dict[Row, str]) -> str:
    """The page, parts and rows in their order in `ticks`."""
    installed = [f"fastres {fastres.__version__}"]
    for name in PACKAGES:
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            installed.append(f"{name} not installed")
    machine = f"{platform.system()} {platform.machine()} ({_C.cpu_capability()})"
    versions = ", ".join([*installed, f"Python {platform.python_version()}", machine])
    lines = [HEAD, f"{versions}; {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}."]
    for part in dict.fromkeys(row.part for row in ticks):
        lines += ["", f"## {part}", "", "| | with | test |", "|---|---|---|"]
        lines += [f"| {tick} | {row.line}" for row, tick in ticks.items() if row.part == part]
    return "\n".join(lines) + "\n"


class Writer:
    """The pytest plugin behind --write-matrix."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}  # by the test's node id
        self.outcomes: dict[Row, set[str]] = {}

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        marked = [item for item in items if item.get_closest_marker("fits_in")]
        config.hook.pytest_deselected(items=[item for item in items if item not in marked])
        items[:] = marked
        for item in items:
            name, part = item.get_closest_marker("fits_in").args
            function = item.nodeid.rpartition("/")[2].partition("[")[0]
            self.rows[item.nodeid] = row = Row(part, name, function)
            self.outcomes[row] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[self.rows[report.nodeid]].add(report.outcome)

    def pytest_sessionfinish(self) -> None:
        ticks = {
            row: "✓" if outcomes == {"passed"} else ", ".join(sorted(outcomes)) or "not run"
            for row, outcomes in self.outcomes.items()
        }
        self.path.write_text(page(ticks))

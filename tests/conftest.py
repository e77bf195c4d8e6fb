"""Fixtures and paths that all tests share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-configuration",
        action="store_true",
        help="compile Triton's kernels in every combination that ships (20 minutes)",
    )
    parser.addoption(
        "--part",
        metavar="I/N",
        help="the I-th of N parts of the tests; those that differ by a shape alone are in one",
    )
    parser.addoption(
        "--write-matrix",
        type=Path,
        metavar="PAGE",
        help="run the tests marked fits_in alone and write docs/matrix.md's page of their outcomes",
    )


def pytest_configure(config: pytest.Config) -> None:
    page = config.getoption("--write-matrix")
    if page is not None:
        import matrix

        config.pluginmanager.register(matrix.Writer(page))


def group_of(item: pytest.Item) -> tuple[str, ...]:
    """A test without its shape: one process compiles its kernels for all shapes."""
    parameters = getattr(item, "callspec", None)
    others = {} if parameters is None else parameters.params
    shapes = ("conv", "case", "pool", "size")
    return (item.nodeid.partition("[")[0], *(str(v) for k, v in others.items() if k not in shapes))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a GPU say so, and are skipped with a reason where there is none."""
    if not config.getoption("--every-configuration"):
        rest = [item for item in items if item.get_closest_marker("every_configuration")]
        config.hook.pytest_deselected(items=rest)
        items[:] = [item for item in items if not item.get_closest_marker("every_configuration")]
    if part := config.getoption("--part"):
        number, count = (int(text) for text in part.split("/"))
        groups = {group: i for i, group in enumerate(dict.fromkeys(map(group_of, items)))}
        chosen = [item for item in items if groups[group_of(item)] % count == number - 1]
        rest = [item for item in items if groups[group_of(item)] % count != number - 1]
        config.hook.pytest_deselected(items=rest)
        items[:] = chosen
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)

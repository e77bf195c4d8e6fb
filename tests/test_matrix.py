"""The committed page docs/matrix.md has the rows that the tests have, each with its tick."""

from __future__ import annotations

import matrix


def test_page_has_exactly_the_tests_rows() -> None:
    lines = matrix.PAGE.read_text().splitlines()
    ticked: list[tuple[str, str]] = []
    for line in lines:
        if line.startswith("## "):
            part = line.removeprefix("## ")
        elif line.startswith("| ✓ | "):
            ticked.append((part, line.removeprefix("| ✓ | ")))
    expected = [(row.part, row.line) for row in matrix.rows()]
    assert sorted(ticked) == sorted(expected), "run pytest --write-matrix=docs/matrix.md"
    assert sum(line.startswith("|") for line in lines) == len(ticked) + 2 * len(dict(ticked))

"""A line chart's geometry, for the page's inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 64, 10, 10, 36  # left: a number of 8 characters
MOST_DOTS = 30


@dataclass(frozen=True)
class Series:
    """A line: what it is called, its run's number, whether it is dashed, and its points (x, y)."""

    name: str
    run: int
    dashed: bool
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Line:
    """A series in the chart's units; parts between points that are not finite stand apart."""

    name: str
    run: int
    dashed: bool
    pieces: tuple[tuple[tuple[float, float], ...], ...]
    dots: bool


@dataclass(frozen=True)
class Chart:
    """Lines and ticks (position, text) in the units of a box of WIDTH x HEIGHT."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def chart(title: str, series: Sequence[Series], suffix: str = "") -> Chart:
    """A chart of `series` over the epoch; `suffix` follows the numbers on the y axis."""
    # Imported here: half a second, which no other command should wait for.
    from matplotlib.ticker import MaxNLocator

    finite = [(x, y) for one in series for x, y in one.points if math.isfinite(y)]
    x_low, x_high = _range([x for x, _ in finite])
    y_low, y_high = _range([y for _, y in finite])
    x_locator, y_locator = MaxNLocator(nbins=6, integer=True), MaxNLocator(nbins=5)
    y_values = [float(y) for y in y_locator.tick_values(y_low, y_high)]
    y_low, y_high = min(y_low, y_values[0]), max(y_high, y_values[-1])
    x_values = [float(x) for x in x_locator.tick_values(x_low, x_high) if x_low <= x <= x_high]
    x_values = [x for x in x_values if x.is_integer()]  # a single epoch's are not

    def x_at(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def y_at(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for one in series:
        pieces: list[list[tuple[float, float]]] = [[]]
        for x, y in one.points:
            if math.isfinite(y):
                pieces[-1].append((x_at(x), y_at(y)))
            elif pieces[-1]:
                pieces.append([])
        whole = tuple(tuple(piece) for piece in pieces if piece)
        lines.append(Line(one.name, one.run, one.dashed, whole, len(one.points) <= MOST_DOTS))
    return Chart(
        title,
        tuple(lines),
        tuple((x_at(x), f"{x:g}") for x in x_values),
        tuple((y_at(y), f"{y:g}{suffix}") for y in y_values),
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest, kept apart where there is only one value or none."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.1 or 0.5
        return low - margin, high + margin
    return low, high

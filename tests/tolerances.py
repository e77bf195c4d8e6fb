"""How close is close enough: judged against float64, with torch's own error as the yardstick."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative errors below this are rounding of the result itself, whatever the algorithm.
FLOOR = {
    torch.float64: 1e-14,
    torch.float32: 2e-7,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}
# fastres's error may be this many times torch's own error in the same dtype.
FACTOR = 2.0


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact| in the Euclidean norm; infinite where actual has a NaN."""
    exact = exact.double()
    error = (actual.double() - exact).norm() / exact.norm().clamp_min(1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """The largest |actual - exact|, relative to exact's root mean square."""
    exact = exact.double()
    if exact.numel() == 0:
        return 0.0
    scale = exact.square().mean().sqrt().clamp_min(1e-30)
    error = (actual.double() - exact).abs().max() / scale
    return float(error) if torch.isfinite(error) else float("inf")


def assert_within_twice(
    actual: Tensor,
    torch_result: Tensor,
    exact: Tensor,
    name: str = "result",
    factor: float = FACTOR,
    computed_in: torch.dtype | None = None,
) -> None:
    """Assert that `actual` is as close to `exact` (float64) as torch is, up to `factor`.

    Both the Euclidean and the largest error count. The floor is one rounding in `computed_in`, the
    dtype of the activations, `actual`'s if None (for the largest error, of an element eight times
    the root mean square).
    """
    assert actual.shape == exact.shape, (name, actual.shape, exact.shape)
    if exact.numel() == 0:
        return
    floor = FLOOR[computed_in or actual.dtype]
    for measure, least in ((relative_error, floor), (largest_error, 8 * floor)):
        ours, theirs = measure(actual, exact), measure(torch_result, exact)
        limit = factor * theirs + least
        assert ours <= limit, (
            f"{name}: {measure.__name__} {ours:.3g}, torch's own {theirs:.3g}, limit {limit:.3g}"
        )

"""How close is close enough: judged against float64, with torch's own error as the yardstick."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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


def well_conditioned(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm channels that are clearly on or clearly off, and blocks small steps.

    A ReLU's gradient jumps at zero: where a rounding error moves an input across it, one
    element's gradient is all error, in torch as here, and by chance. Shifts of six deviations,
    of one sign for a channel in all of a stage, leave only errors that algorithms make. Such
    shifts add up over the blocks until a mean hides its deviations, and then the rounding of one
    channel's mean decides, by chance again: so each block adds a tenth.
    """
    generator = torch.Generator().manual_seed(seed)
    block_ends = [getattr(m, "bn3", m.bn2) for m in model.modules() if hasattr(m, "bn2")]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            channels = module.num_features
            off = torch.arange(channels) % 4 == 3
            shift = 6 + torch.rand(channels, generator=generator)
            size = 0.1 if any(module is end for end in block_ends) else 1.0
            with torch.no_grad():
                module.weight.copy_(size * (0.5 + torch.rand(channels, generator=generator)))
                module.bias.copy_(torch.where(off, -shift, shift) * module.weight)
    return model

"""What this machine can do, measured in the same run as what the benches did."""

from __future__ import annotations

from functools import cache

import torch
from harness import seconds_of


@cache
def measure(device: str, quick: bool = False) -> dict[str, float]:
    """Peaks by name.

    "float32 FLOP/s" (and "bfloat16 FLOP/s" on CUDA): the fastest of several square matrix
    multiplications. "copy B/s": reading and writing a tensor too large for any cache, both
    counted.
    """
    peaks: dict[str, float] = {}
    with torch.inference_mode():
        sizes = (256,) if quick else ((4096, 8192) if device == "cuda" else (1024, 1536, 2048))
        dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
        for dtype in dtypes:
            best = 0.0
            for size in sizes:
                a = torch.randn(size, size, device=device, dtype=dtype)
                b, c = torch.randn_like(a), torch.empty_like(a)
                seconds = _fastest(lambda a=a, b=b, c=c: torch.mm(a, b, out=c), device, quick)
                best = max(best, 2 * size**3 / seconds)
            peaks[f"{str(dtype).removeprefix('torch.')} FLOP/s"] = best
        count = 2**20 if quick else (2**29 if device == "cuda" else 2**26)
        source = torch.zeros(count, device=device)
        target = torch.zeros_like(source)
        copied = _fastest(lambda: target.copy_(source), device, quick)
        peaks["copy B/s"] = 2 * source.nbytes / copied
    return peaks


def _fastest(run, device: str, quick: bool) -> float:
    seconds_of(run, 1, device)
    return min(seconds_of(run, 3, device) for _ in range(2 if quick else 8))

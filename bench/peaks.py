"""What this machine can do, measured in the same run as what the benches did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import seconds_of

_best: dict[str, dict[str, float]] = {}


def measure(device: str, quick: bool = False) -> dict[str, float]:
    """The highest rates that this run has seen so far, measured once more.

    Called before every case, so that one slow spell of the machine does not pass for its peak.

    Returns:
        "float32 FLOP/s" (and "bfloat16 FLOP/s" on CUDA): the fastest of several square matrix
        multiplications. "copy B/s": reading and writing a tensor too large for any cache, both
        counted.
    """
    best = _best.setdefault(device, {})

    def note(name: str, work: float, run: Callable[[], Any]) -> None:
        seconds_of(run, 1, device)
        fastest = min(seconds_of(run, 2, device) for _ in range(2 if quick else 4))
        best[name] = max(best.get(name, 0.0), work / fastest)

    with torch.inference_mode():
        sizes = (256,) if quick else ((4096, 8192) if device == "cuda" else (1024, 2048))
        dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
        for dtype in dtypes:
            name = f"{str(dtype).removeprefix('torch.')} FLOP/s"
            for size in sizes:
                a = torch.randn(size, size, device=device, dtype=dtype)
                b, c = torch.randn_like(a), torch.empty_like(a)
                note(name, 2 * size**3, lambda a=a, b=b, c=c: torch.mm(a, b, out=c))
        count = 2**20 if quick else (2**29 if device == "cuda" else 2**26)
        source = torch.zeros(count, device=device)
        target = torch.zeros_like(source)
        note("copy B/s", 2 * source.nbytes, lambda: target.copy_(source))
    return dict(best)


def put_shares(records: list[dict[str, Any]]) -> None:
    """Write the run's highest rates into its records, and fastres's share of them."""
    for record in records:
        record["peaks"] = dict(_best.get(record["runs_on"], {}))
        peak = record["peaks"].get(record.get("peak", ""))
        work = record.get("flops") or record.get("bytes")
        seconds = record["times"].get(record["fastres"])
        if peak and work and seconds:
            record["share_of_peak"] = work / seconds / peak

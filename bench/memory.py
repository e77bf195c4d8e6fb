"""What a training step keeps in memory.

Two figures, both without parameters, optimizer state and the batch itself:

* peak: the most that torch's allocator held during one step beyond what it held before (so the
  gradients are in it, which at small batches are most of it). On CUDA
  from torch.cuda.max_memory_allocated. On the CPU from the profiler's record of every allocation
  and release, which sees temporaries inside C++ kernels too, as long as they are tensors.
* kept: bytes of the distinct storages that autograd saves for the backward, seen by
  saved-tensor hooks at the end of the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastres import _C


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most bytes held at once during `run` beyond those held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The profiler sees torch's allocator only: have it serve the kernels' results too.
    limit = _C.set_kept_memory_limit(0)
    try:
        return _peak_on_cpu(run)
    finally:
        _C.set_kept_memory_limit(limit)


def _peak_on_cpu(run: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    changes = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most


def kept_bytes(run: Callable[[], Any], without: Iterable[Tensor]) -> int:
    """Bytes that autograd saves during `run`, a storage once, storages of `without` not at all."""
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    # The saved tensors are held until the end, so that no address is used twice.
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            saved[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())

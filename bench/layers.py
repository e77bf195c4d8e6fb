"""Where a model's time goes by kind of layer, and how far each kind is from the machine's peaks.

The roofline model: Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model
for Multicore Architectures", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness import median, seconds_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

REST = "rest"
PEAKS = ("float32 FLOP/s", "copy B/s")
CONVS = ("conv_bn_relu", "conv_stats", "conv_stats_backward")
# Dispatcher's name, without namespace and overload -> kind. In the order of a table's lines.
KINDS = {
    "bn_add_relu": "BatchNorm + add + ReLU",
    "add_relu": "add + ReLU",
    "max_pool2d": "pool",
    "max_pool2d_with_indices": "pool",
    "adaptive_avg_pool2d": "pool",
    "mean": "pool",
    "avg_pool_linear": "pool + fc",
    "linear": "fc",
    "addmm": "fc",
    "mm": "fc backward",
    "max_pool2d_backward": "pool backward",
    "max_pool2d_with_indices_backward": "pool backward",
    "add_relu_backward": "add + ReLU backward",
    "bn_add_relu_backward": "BatchNorm + add + ReLU backward",
    "_fused_sgd_": "optimizer",
}
SHARED_GRADIENT = "sum of two branches' gradients"


@dataclass(frozen=True)
class Call:
    """One call of an op: its kind, its FLOPs, the fewest bytes that it must move."""

    kind: str
    flops: int
    nbytes: int


@dataclass(frozen=True)
class Profile:
    """A pass over a model.

    Attributes:
        seconds: of a whole pass without the profiler.
        of_kinds: seconds of each kind's calls together; what no kind has is not in it.
        calls: every call of one pass, in order.
    """

    seconds: float
    of_kinds: dict[str, float]
    calls: list[Call]


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value of an op's argument or result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def _nbytes(value: Any) -> int:
    # An expanded tensor has fewer bytes than elements to show.
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors(value))


def arguments(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that the op's schema gives them."""
    return dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | dict(kwargs)


def share_read(weight: Tensor, stride: Sequence[int]) -> float:
    """The share of its input that a convolution reads: a 1×1 with a stride of 2 reads a quarter."""
    return min(1.0, weight.shape[2] / stride[0]) * min(1.0, weight.shape[3] / stride[1])


def _conv(name: str, given: Mapping[str, Any], outputs: Any) -> tuple[str, int]:
    """Kind and FLOPs of a convolution on `input` (N, Ci, H, W) with `weight` (Co, Ci, kh, kw)."""
    weight, stride = given["weight"], given["stride"][0]
    kh, kw = weight.shape[2:]
    kind = "stem" if weight.shape[1] == 3 else f"{kh}x{kw}" + f" stride {stride}" * (stride > 1)
    if not name.endswith("_backward"):
        return kind, 2 * next(tensors(outputs)).numel() * weight[0].numel()
    passes = given["needs_input"] + given["needs_weight"]
    return f"{kind} backward", passes * 2 * given["dz"].numel() * weight[0].numel()


def classify(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any) -> Call | None:
    """What a call of the dispatcher's `op` is; None for what belongs to the rest.

    A multiply-add is two FLOPs. Bytes are those of every input, weight and output once, of a tensor
    that is changed in place twice.
    """
    name = op._schema.name.split("::")[1]
    given = arguments(op, args, kwargs)
    # The packed weight stands for the weight.
    nbytes = _nbytes([value for key, value in given.items() if key != "packed"]) + _nbytes(outputs)
    if name in CONVS:
        kind, flops = _conv(name, given, outputs)
        unread = 1 - share_read(given["weight"], given["stride"])
        return Call(kind, flops, nbytes - round(unread * _nbytes(given["input"])))
    if name == "add" and outputs.dim() == 4:
        return Call(SHARED_GRADIENT, 0, nbytes)
    if name not in KINDS:
        return None
    flops = 0
    if name == "avg_pool_linear":
        flops = 2 * outputs.numel() * given["weight"].shape[1]
    elif name in ("linear", "addmm", "mm"):
        # addmm's `self` is the bias.
        left = given["mat1" if name == "addmm" else "input" if name == "linear" else "self"]
        flops = 2 * left.numel() * outputs.shape[-1]
    written = [
        a.name
        for a in op._schema.arguments
        # The optimizer's schema lets it change the gradients, which only scaling for AMP does.
        if a.alias_info and a.alias_info.is_write and a.name != "grads"
    ]
    return Call(KINDS[name], flops, nbytes + _nbytes([given.get(key) for key in written]))


class _Watch(TorchDispatchMode):
    """Times every call under the dispatcher; autograd's own calls come through here as well."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Call, float]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = time.perf_counter()
        outputs = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - before
        call = classify(func, args, kwargs or {}, outputs)
        if call is not None:
            self.calls.append((call, seconds))
        return outputs


def profile(run: Callable[[], Any], passes: int = 9) -> Profile:
    """Profile `run`, which has run before: medians of `passes` with and without the profiler."""
    whole: list[float] = []
    of_kinds: dict[str, list[float]] = {}
    calls: list[Call] = []
    for _ in range(passes):
        whole.append(seconds_of(run, 1, "cpu"))
        with _Watch() as watch:
            run()
        calls = [call for call, _ in watch.calls]
        for kind in dict.fromkeys(call.kind for call in calls):
            seconds = sum(taken for call, taken in watch.calls if call.kind == kind)
            of_kinds.setdefault(kind, []).append(seconds)
    return Profile(median(whole), {k: median(v) for k, v in of_kinds.items()}, calls)


def by_kind(found: Profile, peaks: Mapping[str, float]) -> list[dict[str, Any]]:
    """The record's "layers": a line a kind, in the order of the first call, and the rest.

    Args:
        found: a profile.
        peaks: peaks.measure()'s, of which `PEAKS` are used.

    Returns:
        "kind", "calls", "seconds", "share" of the whole, and of all but the rest "flops", "bytes",
        "roofline": the seconds of its calls if each went at one of the peaks (the larger of FLOPs
        over FLOP/s and bytes over B/s), and "distance": seconds over those. Winograd, matrix
        instructions and caches may bring a kind below 1.
    """
    flop_rate, byte_rate = (peaks[name] for name in PEAKS)
    lines: list[dict[str, Any]] = []
    for kind, seconds in found.of_kinds.items():
        calls = [call for call in found.calls if call.kind == kind]
        roofline = sum(max(c.flops / flop_rate, c.nbytes / byte_rate) for c in calls)
        lines.append(
            {
                "kind": kind,
                "calls": len(calls),
                "seconds": seconds,
                "share": seconds / found.seconds,
                "flops": sum(call.flops for call in calls),
                "bytes": sum(call.nbytes for call in calls),
                "roofline": roofline,
                "distance": seconds / roofline,
            }
        )
    # Sum and whole are of different passes, so the sum may be the larger by a little.
    rest = max(0.0, found.seconds - sum(found.of_kinds.values()))
    lines.append({"kind": REST, "calls": None, "seconds": rest, "share": rest / found.seconds})
    return lines


HEADINGS = ("layers", "calls", "time", "share", "GFLOP/s", "MB", "at the peaks", "distance")


def cells(line: Mapping[str, Any]) -> list[str]:
    """A line of by_kind as text, under `HEADINGS`."""
    start = [
        line["kind"],
        "" if line["calls"] is None else str(line["calls"]),
        f"{line['seconds'] * 1e3:.2f} ms",
        f"{line['share']:.0%}",
    ]
    if "roofline" not in line:
        return [*start, "", "", "", ""]
    rate = line["flops"] / line["seconds"] / 1e9 if line["seconds"] else 0.0
    return [
        *start,
        f"{rate:,.0f}" if rate else "",
        f"{line['bytes'] / 1e6:,.1f}",
        f"{line['roofline'] * 1e3:.2f} ms",
        f"{line['distance']:.2f}",
    ]


def verdict(lines: Sequence[Mapping[str, Any]], peaks: Mapping[str, float]) -> str:
    """The peaks, and the kind of layers that has most to gain."""
    flop_rate, byte_rate = (peaks[name] for name in PEAKS)
    said = f"FMA peak {flop_rate / 1e9:,.0f} GFLOP/s (float32), copy {byte_rate / 1e9:,.1f} GB/s"
    known = [line for line in lines if "roofline" in line]
    if not known:
        return said
    worst = max(known, key=lambda line: line["seconds"] - line["roofline"])
    over = worst["seconds"] - worst["roofline"]
    return f"{said}; most to gain: {worst['kind']}, {over * 1e3:.2f} ms above its roofline"

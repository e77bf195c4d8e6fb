"""The yardstick: what a GPU needs at its ceilings for each kernel and shape of the family.

    python bench/roofline.py                                every model at its batch sizes
    python bench/roofline.py --only resnet50 --json FILE
    python bench/roofline.py --ceilings bench/results/gpu.json

Nothing is run and nothing measured: fastres's models pass over tensors without memory ("meta"), and
for every kernel that would run the FLOPs and the fewest bytes are counted. A kernel's time at the
ceilings is the larger of FLOPs over the FLOP/s and bytes over the B/s of the card (Williams,
Waterman, Patterson, "Roofline", Communications of the ACM 52(4), 2009). No kernel can be faster
where its tensors do not stay in the caches; no figure here says how fast one is.

The ceilings are a data sheet's (--card), given (--flops, --bandwidth), or those that compare.py
measured on a card (--ceilings): its JSON files hold the fastest matrix product and copy of the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import layers
import torch
from harness import write_json
from rich.console import Console
from rich.table import Table
from rivals import load
from table import in_units
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import ModelCase, cifar, shorten

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Ceilings:
    """A card's FLOP/s in matrix products and B/s of its memory, and where the two come from."""

    flops: float
    bandwidth: float
    source: str

    def seconds(self, work: Work) -> float:
        """The time that no kernel for `work` can be below."""
        return max(work.flops / self.flops, work.nbytes / self.bandwidth)

    def bound(self, work: Work) -> str:
        """Which of the two ceilings `work` meets."""
        return "FLOPs" if work.flops / self.flops > work.nbytes / self.bandwidth else "bytes"


# FLOP/s of the tensor cores without sparsity, in 16 bit and in TF32, and B/s.
DATA_SHEETS = {
    "h100": (989.4e12, 494.7e12, 3.35e12, "NVIDIA H100 data sheet (SXM, 80 GB), dense"),
    "a100": (312e12, 156e12, 2.039e12, "NVIDIA A100 data sheet (SXM, 80 GB), dense"),
}


def data_sheet(card: str, dtype: torch.dtype) -> Ceilings:
    """The ceilings that the maker of `card` states."""
    half, tf32, bandwidth, source = DATA_SHEETS[card]
    return Ceilings(tf32 if dtype == torch.float32 else half, bandwidth, source)


def measured(path: Path, dtype: torch.dtype) -> Ceilings:
    """The highest rates on CUDA in a JSON file of compare.py.

    Raises:
        ValueError: no record of the file was measured on a CUDA device.
    """
    records = [r for r in json.loads(path.read_text()) if r.get("runs_on") == "cuda"]
    if not records:
        raise ValueError(f"{path} has no record of a CUDA device: it cannot give ceilings")
    # float16 has bfloat16's rate; float32 products go through TF32 only where torch allows it.
    name = "float32 FLOP/s" if dtype == torch.float32 else "bfloat16 FLOP/s"
    flops, bandwidth = (max(r["peaks"][key] for r in records) for key in (name, "copy B/s"))
    device, date = records[0]["device"], records[0]["date"][:10]
    return Ceilings(flops, bandwidth, f"measured on {device}, {date} ({path.name})")


@dataclass(frozen=True)
class Work:
    """What one call of a kernel must do.

    Attributes:
        op: the op in torch's dispatcher, which may need several kernels.
        kernel: which of them.
        shape: the tensors' sizes.
        flops: of convolutions and matrix products, a multiply-add being two; all else is bound by
            its bytes on every GPU.
        nbytes: each input that is read and each output, once.
    """

    op: str
    kernel: str
    shape: str
    flops: int
    nbytes: int

    @property
    def intensity(self) -> float:
        """FLOPs for each byte."""
        return self.flops / self.nbytes if self.nbytes else 0.0


def _nbytes(*values: Any) -> int:
    # Indices (of a pool's maxima) can be found again.
    return sum(t.nbytes for value in values for t in layers.tensors(value) if t.is_floating_point())


def _size(tensor: Tensor) -> str:
    n, *rest = tensor.shape
    return f"{n} x " + "x".join(map(str, rest)) if rest else str(n)


def _conv_shape(given: Mapping[str, Any], input: Tensor, output: Tensor) -> str:
    weight, stride = given["weight"], given["stride"][0]
    kernel = f"{weight.shape[2]}x{weight.shape[3]}" + (f" stride {stride}" if stride > 1 else "")
    size = "x".join(map(str, input.shape[2:]))
    return f"{input.shape[0]} x {size}, {input.shape[1]} to {output.shape[1]}, {kernel}"


def _conv_backward(given: Mapping[str, Any], outputs: Sequence[Tensor]) -> list[Work]:
    """The two products of a convolution's gradient.

    BatchNorm's own gradient is applied to dz as it is loaded (which reads z), ReLU's mask and the
    sums for the layer before are taken from the input as the data gradient is written.
    """
    weight, z, input = given["weight"], given["z"], given["input"]
    vectors = [given[name] for name in ("dmean", "dvar", "mean")]
    prologue = [given[name] for name in ("in_mean", "in_var", "in_weight", "in_bias")]
    shape = _conv_shape(given, input, z)
    flops = 2 * z.numel() * weight[0].numel()
    # A stride larger than the kernel leaves pixels of the input unread.
    read = round(_nbytes(input) * layers.share_read(weight, given["stride"]))
    found = []
    if given["needs_input"]:
        masked = _nbytes(prologue) + read if given["in_mean"] is not None else 0
        moved = _nbytes(given["dz"], z, vectors, weight, outputs[0], outputs[2:]) + masked
        kernel = "conv data gradient" + AFTER_BN * (given["in_mean"] is not None)
        found.append(Work("conv_stats_backward", kernel, shape, flops, moved))
    if given["needs_weight"]:
        moved = _nbytes(given["dz"], z, vectors, prologue, outputs[1]) + read
        kernel = "conv weight gradient" + AFTER_BN * (given["in_mean"] is not None)
        found.append(Work("conv_stats_backward", kernel, shape, flops, moved))
    return found


# What a convolution does to its input as it loads it, with the BatchNorm of the layer before.
AFTER_BN = " after bn_relu"
# Names of what torch computes, where they are not the op's.
NAMES = {
    "add": layers.SHARED_GRADIENT,
    "addmm": "linear",
    "mm": "linear gradient",
    "max_pool2d_with_indices": "max_pool2d",
    "max_pool2d_with_indices_backward": "max_pool2d_backward",
    "mean": "average pool",
}


def _optimizer(count: int) -> Work:
    # Read: parameter, gradient and momentum; written: parameter and momentum. All in float32.
    return Work("_fused_sgd_", "optimizer", f"{count:,} parameters", 0, 20 * count)


def works_of(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any) -> list[Work]:
    """The kernels behind one call of the dispatcher's `op`; none for what is too small to count."""
    given = layers.arguments(op, args, kwargs)
    name = op._schema.name.split("::")[1]
    if name == "conv_stats_backward":
        return _conv_backward(given, outputs)
    call = layers.classify(op, args, kwargs, outputs)
    if call is None:
        return []
    if name == "_fused_sgd_":
        return [_optimizer(sum(p.numel() for p in given["self"]))]
    first = next(layers.tensors(outputs))
    if name in layers.CONVS:
        shape = _conv_shape(given, given["input"], first)
        kernel = name.replace("bn_", "bn_add_") if given.get("residual") is not None else name
        kernel += AFTER_BN * (given.get("in_mean") is not None)
        return [Work(name, kernel, shape, call.flops, call.nbytes)]
    kernel = NAMES.get(name, name)
    if name.startswith("bn_add_relu"):
        kind = "" if given["residual"] is None else "add_"
        kind = "add_bn_" if given["residual_mean"] is not None else kind
        kernel = name.replace("add_", kind)
    if name == "bn_add_relu_backward" and given["residual_mean"] is None:
        del given["residual"]  # only a residual with a BatchNorm is read
    return [Work(name, kernel, _size(first), call.flops, _nbytes(list(given.values()), outputs))]


class _Record(TorchDispatchMode):
    """Collects the work of everything that passes through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        self.works += works_of(func, args, kwargs or {}, outputs)
        return outputs


def work_of_run(run: Callable[[], Any]) -> list[Work]:
    """The work of every kernel that `run` calls, in order."""
    with _Record() as record:
        run()
    return record.works


def _meta_model(case: ModelCase, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        model = getattr(load("fastres.models"), case.model)(
            num_classes=case.classes, stem=case.stem, fused=True
        )
    if case.short:
        shorten(model)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
    return model


def work_of_model(case: ModelCase, training: bool, dtype: torch.dtype) -> list[Work]:
    """The work of an inference, or of a training step with SGD, of fastres's fused model.

    In 16 bit the parameters stay in float32, as under autocast, and the step holds their casts.
    """
    model = _meta_model(case, dtype).train(training)
    shape = (case.n, 3, case.size, case.size)
    images = torch.empty(shape, dtype=dtype, device="meta")
    images = images.contiguous(memory_format=torch.channels_last)
    if not training:
        with torch.no_grad():
            return work_of_run(lambda: model(images))
    works = work_of_run(lambda: model(images).sum().backward())
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    if dtype.itemsize == 2:
        # A parameter is read in 4 bytes and written in 2, its gradient the other way round.
        cast = 12 * sum(p.numel() for p in parameters if p.dtype == dtype)
        works.append(Work("_to_copy", "casts of autocast", f"{count:,} parameters", 0, cast))
    works.append(_optimizer(count))
    return works


def lines_of(works: Sequence[Work], ceilings: Ceilings) -> list[dict[str, Any]]:
    """A line for each kernel and shape, in the order of the first call.

    Returns:
        Work's fields, "calls", "intensity" in FLOPs a byte, "bound" ("FLOPs" or "bytes") and, of
        all the calls together, "seconds" at the ceilings.
    """
    return [
        {
            **asdict(work),
            "calls": calls,
            "intensity": work.intensity,
            "bound": ceilings.bound(work),
            "seconds": calls * ceilings.seconds(work),
        }
        for work, calls in Counter(works).items()
    ]


MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
CASES = (
    *((ModelCase(model, 224, n), False) for model in MODELS for n in (1, 32, 256)),
    (cifar("resnet18", 512), False),
    *((ModelCase(model, 224, 256), True) for model in MODELS),
    (cifar("resnet18", 512), True),
)


def record_of(
    case: ModelCase, training: bool, dtype: torch.dtype, ceilings: Ceilings
) -> dict[str, Any]:
    """A case's lines and their sums, for a JSON file."""
    lines = lines_of(work_of_model(case, training, dtype), ceilings)
    seconds = sum(line["seconds"] for line in lines)
    return {
        "suite": "roofline",
        "case": f"{case} {'training' if training else 'inference'}",
        "dtype": str(dtype).removeprefix("torch."),
        "ceilings": asdict(ceilings),
        "flops": sum(line["calls"] * line["flops"] for line in lines),
        "bytes": sum(line["calls"] * line["nbytes"] for line in lines),
        "seconds": seconds,
        "images": case.n,
        "images_per_second": case.n / seconds,
        "kernels": lines,
    }


def _table(title: str, headings: Sequence[str], text: int) -> Table:
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < text else "right", no_wrap=True)
    return table


def kernels_table(record: Mapping[str, Any]) -> Table:
    """Every kernel and shape of a case."""
    headings = (
        "kernel", "shape", "calls", "GFLOP", "MB", "FLOP/B", "bound by", "each", "all", "share"
    )  # fmt: skip
    table = _table(record["case"], headings, 2)
    for line in record["kernels"]:
        table.add_row(
            line["kernel"],
            line["shape"],
            str(line["calls"]),
            f"{line['flops'] / 1e9:,.2f}" if line["flops"] else "",
            f"{line['nbytes'] / 1e6:,.1f}",
            f"{line['intensity']:,.0f}" if line["flops"] else "",
            line["bound"],
            in_units(line["seconds"] / line["calls"]),
            in_units(line["seconds"]),
            f"{line['seconds'] / record['seconds']:.1%}",
        )
    return table


def sums_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """A line a model: its step at the ceilings."""
    headings = ("model", "GFLOP", "MB", "at the ceilings", "images/s", "bound by bytes")
    table = _table(f"A step at the ceilings, {records[0]['dtype']}", headings, 1)
    for record in records:
        by_bytes = sum(line["seconds"] for line in record["kernels"] if line["bound"] == "bytes")
        table.add_row(
            record["case"],
            f"{record['flops'] / 1e9:,.1f}",
            f"{record['bytes'] / 1e6:,.0f}",
            in_units(record["seconds"]),
            f"{record['images_per_second']:,.0f}",
            f"{by_bytes / record['seconds']:.0%}",
        )
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has TEXT")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the activations")
    parser.add_argument("--card", default="h100", choices=DATA_SHEETS, help="whose data sheet")
    parser.add_argument("--ceilings", type=Path, metavar="FILE", help="JSON of compare.py instead")
    parser.add_argument("--flops", type=float, metavar="X", help="FLOP/s of matrix products")
    parser.add_argument("--bandwidth", type=float, metavar="X", help="B/s of the memory")
    parser.add_argument("--summary", action="store_true", help="the sums of the models alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    options = parser.parse_args(arguments)
    for name in ("flops", "bandwidth"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name} is {value}, expected a number above 0")
    return options


def ceilings_of(options: argparse.Namespace) -> Ceilings:
    """What the command line says, the data sheet where it says nothing."""
    dtype = DTYPES[options.dtype]
    found = (
        measured(options.ceilings, dtype) if options.ceilings else data_sheet(options.card, dtype)
    )
    given = [name for name in ("flops", "bandwidth") if getattr(options, name) is not None]
    if not given:
        return found
    source = " and ".join(f"--{name}" for name in given)
    source += "" if len(given) == 2 else f", else {found.source}"
    return Ceilings(options.flops or found.flops, options.bandwidth or found.bandwidth, source)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        ceilings = ceilings_of(options)
    except (OSError, ValueError) as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 2
    records = [
        record_of(case, training, DTYPES[options.dtype], ceilings)
        for case, training in CASES
        if options.only in f"{case} {'training' if training else 'inference'}"
    ]
    if not records:
        print(f"roofline: no case has {options.only!r} in its name", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    if not options.summary:
        for record in records:
            console.print(kernels_table(record))
    console.print(sums_table(records))
    console.print(
        f"Ceilings, not results: {ceilings.flops / 1e12:,.1f} TFLOP/s, "
        f"{ceilings.bandwidth / 1e12:,.2f} TB/s: {ceilings.source}."
    )
    if options.json:
        write_json(records, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m fastres.env`: versions, CPU capability, which kernel computes what, and why.

Put its output into a bug report.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from fastres import _C, tune
from fastres.backends import cpu
from fastres.library import library_path
from fastres.ops._register import LAUNCHERS, OPS, why_no_triton
from fastres.version import __version__

VARIABLES = {
    "FASTRES_CPU_CAPABILITY": "upper bound of the CPU instruction set: baseline, avx2, avx512 or "
    "amx",
    "FASTRES_CPU_ALGORITHM": "convolution on the CPU: winograd4, winograd2, digits, amx or packed "
    "(ours), aten (torch's); default: by shape",
    "FASTRES_CPU_KEEP_MB": "megabytes of freed memory that the CPU kernels keep for their next "
    "results; default: 1024, or an eighth of the machine's memory if that is less",
    "FASTRES_LOG": "conv: a line on stderr for every distinct convolution on the CPU, when it is "
    "first seen: its sizes, what computes it, and why",
    "FASTRES_GPU_CONV": "convolution on CUDA: triton (ours), cudnn or auto: by the tables",
    "FASTRES_GPU_TABLE": "a table of `fastres tune` to read before what ships; none: no table at "
    "all; default: the one stored for this card",
}


@dataclass(frozen=True)
class Kernel:
    """Who computes an op on a device, and why not a kernel of fastres where it is none."""

    op: str
    device: str
    computed_by: str
    reason: str = ""


def versions() -> dict[str, str]:
    """Versions of fastres and of what it stands on."""
    found = {"fastres": __version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "triton", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    build = _C.build_info()
    found["built with"] = f"{build['compiler']}, torch {build['torch']}"
    return found


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastres::{op}", key)


def kernels() -> list[Kernel]:
    """For every op: what computes it on a CPU and on CUDA."""
    no_triton = why_no_triton()
    rows = []
    for op in OPS:
        if _has_kernel(op, "CPU"):
            rows.append(Kernel(op, "cpu", f"C++ ({_C.cpu_capability()})"))
        else:
            rows.append(Kernel(op, "cpu", "plain torch", "no C++ kernel in this build"))
        if op not in LAUNCHERS:
            rows.append(Kernel(op, "cuda", "plain torch", "used on the CPU only"))
        elif no_triton is None:
            rows.append(Kernel(op, "cuda", "Triton"))
        else:
            rows.append(Kernel(op, "cuda", "not live", no_triton))
    return rows


@dataclass(frozen=True)
class Convolution:
    """A convolution of the family, and the algorithms for it on the CPU in float32."""

    name: str
    inference: tuple[str, ...]  # for each of BATCHES
    training: tuple[str, ...]


BATCHES = (1, 16)
# (kernel, stride, C_in, C_out, input size): ImageNet's sizes, then CIFAR's.
_CONVOLUTIONS = (
    (7, 2, 3, 64, 224),
    (3, 1, 64, 64, 56),
    (3, 1, 128, 128, 28),
    (3, 1, 256, 256, 14),
    (3, 1, 512, 512, 7),
    (3, 2, 128, 256, 28),
    (1, 1, 256, 64, 56),
    (1, 2, 128, 256, 28),
    (3, 1, 3, 64, 32),
    (3, 1, 64, 64, 32),
    (3, 1, 512, 512, 4),
)


def convolutions() -> list[Convolution]:
    """For typical convolutions: the algorithm that computes them on the CPU, as things are."""
    rows = []
    for kernel, stride, c_in, c_out, size in _CONVOLUTIONS:
        weight = (c_out, c_in, kernel, kernel)
        inference, training = (
            tuple(
                cpu.conv_algorithm(
                    (n, c_in, size, size), weight, stride, kernel // 2, training=train
                )
                for n in BATCHES
            )
            for train in (False, True)
        )
        name = (
            f"{kernel}x{kernel}{f' s{stride}' if stride > 1 else ''}, {c_in} to {c_out}, {size}px"
        )
        rows.append(Convolution(name, inference, training))
    return rows


def main() -> None:
    """Print everything."""
    console = Console(highlight=False)
    about = Table("", "version", title="Versions", title_justify="left")
    for name, version in versions().items():
        about.add_row(name, version)
    console.print(about)

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = Table("", "", title="Machine", title_justify="left", show_header=False)
    machine.add_row(
        "processor", f"{platform.machine()}, torch uses {torch.get_num_threads()} threads"
    )
    machine.add_row("instruction set", _C.cpu_capability())
    machine.add_row("it could also use", ", ".join(_C.available_cpu_capabilities()))
    machine.add_row("CUDA device", device)
    machine.add_row("library of the ops", str(library_path()))
    console.print(machine)

    table = Table("op", "device", "computed by", "why", title="Kernels", title_justify="left")
    for kernel in kernels():
        table.add_row(kernel.op, kernel.device, kernel.computed_by, kernel.reason)
    console.print(table)
    console.print(
        "Other devices: plain torch. float64 and what no kernel fits (groups, dilation): "
        "torch's convolution with fastres's passes around it.\n"
        "Inputs in channels_last are fastest: model.to(memory_format=torch.channels_last)."
    )

    algorithms = Table(
        "convolution",
        *(f"{mode}, {n}" for mode in ("eval", "train") for n in BATCHES),
        title="Convolutions on the CPU in float32, by mode and batch size",
        title_justify="left",
    )
    for conv in convolutions():
        algorithms.add_row(conv.name, *conv.inference, *conv.training)
    console.print(algorithms)
    console.print(f"fastres.backends.cpu.allow_winograd = {cpu.allow_winograd}")

    no_triton = why_no_triton()
    if no_triton is None:
        choices = Table(
            "convolution", "computed by", "why", title="Convolutions on CUDA in bfloat16"
        )
        choices.title_justify = "left"
        try:
            for row in tune.typical_choices():
                choices.add_row(*row)
            console.print(choices)
        except ValueError as error:  # a bug report should say it, and the rest as well
            console.print(f"Convolutions on CUDA: {error}")
    else:
        console.print(f"Convolutions on CUDA: not live: {no_triton}")

    settings = Table("variable", "value", "meaning", title="Settings", title_justify="left")
    for variable, meaning in VARIABLES.items():
        settings.add_row(variable, os.environ.get(variable, ""), meaning)
    console.print(settings)


if __name__ == "__main__":
    main()

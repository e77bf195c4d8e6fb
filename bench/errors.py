"""How exact each of the CPU's convolution algorithms is, against float64, beside torch's own.

    python bench/errors.py --write docs/errors.md

One training step's forward (z) and both gradients of every 3x3 convolution without a stride of the
family and of one convolution of each other kind, on batches that are cut down but keep every sum's
length; of digits, which is for inference, the forward. Errors are relative in the Euclidean norm /
the largest over the root mean square.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from harness import circumstances
from rich.progress import track
from torch import Tensor

from cases import RESNET_CONVS, Conv
from fastres import ops
from fastres.backends import cpu
from tolerances import largest_error, relative_error

ALGORITHMS = ("aten", "packed", "amx", "digits", "winograd2", "winograd4")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cases() -> list[Conv]:
    """Every 3x3 convolution without a stride once, and one of each other kind."""
    chosen: dict[tuple[int, ...], Conv] = {}
    for conv in RESNET_CONVS:
        plain = conv.kernel == 3 and conv.stride == 1
        kind = (conv.kernel, conv.stride, conv.c_in if plain else 0, conv.size if plain else 0)
        chosen.setdefault(kind, conv.batch(max(1, 4096 // conv.out**2)))
    return list(chosen.values())


def step(conv: Conv, tensors: list[Tensor]) -> list[Tensor]:
    """z and the gradients of input and weight."""
    x, w, dz = tensors
    geometry = ([conv.stride] * 2, [conv.padding] * 2, [1, 1], 1)
    z, mean, _ = torch.ops.fastres.conv_stats(x, w, None, None, None, None, 0.0, *geometry)
    zero = torch.zeros_like(mean)
    dx, dw, *_ = torch.ops.fastres.conv_stats_backward(
        dz, zero, zero, x, w, z, mean, None, None, None, None, 0.0, *geometry, True, True
    )
    return [z, dx, dw]


def inference(conv: Conv, x: Tensor, w: Tensor) -> list[Tensor]:
    """z, of a weight that is kept."""
    geometry = ([conv.stride] * 2, [conv.padding] * 2, [1, 1], 1)
    packed = ops.pack_conv_weight(w, *geometry, [conv.n, conv.size, conv.size])
    zeros, ones = torch.zeros(conv.c_out), torch.ones(conv.c_out)
    args = (x, w, None, zeros, ones, None, None, 0.0, None)
    return [ops.conv_bn_relu(*args, *geometry, False, packed)]


def exact_step(conv: Conv, tensors: list[Tensor]) -> list[Tensor]:
    x, w = (t.double().requires_grad_() for t in tensors[:2])
    z = torch.nn.functional.conv2d(x, w, None, conv.stride, conv.padding)
    return [z.detach(), *torch.autograd.grad(z, (x, w), tensors[2].double())]


def rows(conv: Conv, dtype: torch.dtype) -> list[str]:
    """A line of the table for each algorithm that can compute `conv`."""
    torch.manual_seed(0)
    fan_in = conv.c_in * conv.kernel**2
    shapes = ((conv.n, conv.c_in, conv.size), (conv.n, conv.c_out, conv.out))
    x, dz = (torch.randn(n, c, s, s).to(dtype) for n, c, s in shapes)
    w = (torch.randn(conv.c_out, conv.c_in, conv.kernel, conv.kernel) * (2 / fan_in) ** 0.5).to(
        dtype
    )
    x, dz = (t.contiguous(memory_format=torch.channels_last) for t in (x.relu(), dz))
    exact = exact_step(conv, [x, w, dz])
    lines = []
    for algorithm in ALGORITHMS:
        if algorithm.startswith("winograd") and algorithm not in conv.winograd:
            continue
        os.environ["FASTRES_CPU_ALGORITHM"] = algorithm
        if algorithm == "digits":
            geometry = {"stride": conv.stride, "padding": conv.padding, "dtype": dtype}
            if cpu.conv_algorithm(x.shape, w.shape, **geometry) != algorithm:
                continue
            results = inference(conv, x, w)
        else:
            results = step(conv, [x, w, dz])
        errors = [
            f"{relative_error(a, b):.1e} / {largest_error(a, b):.1e}"
            for a, b in zip(results, exact, strict=False)
        ]
        errors += ["-"] * (len(exact) - len(results))
        lines.append(f"| {conv} | {algorithm} | {' | '.join(errors)} |")
    del os.environ["FASTRES_CPU_ALGORITHM"]
    return lines


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="write the tables here (default: print them)")
    parser.add_argument("--quick", action="store_true", help="two cases: does it still run?")
    arguments = parser.parse_args()
    here = circumstances("cpu")
    text = [
        "# How exact the CPU's convolutions are",
        "",
        "Written by `python bench/errors.py`: a training step's forward (z) and both gradients,",
        "for every 3x3 convolution without a stride and one of each other kind, against",
        "float64; `digits`, which is for inference, has the forward only. Euclidean error relative",
        "to the whole / largest error relative to the root mean square.",
        f"`aten` is torch's own. {here['device']}, torch {here['versions']['torch']}.",
    ]
    for name, dtype in DTYPES.items():
        text += ["", f"## {name}", "", "| convolution | algorithm | z | dinput | dweight |"]
        text.append("|---|---|---:|---:|---:|")
        for conv in track(cases()[: 2 if arguments.quick else None], name):
            text += rows(conv, dtype)
    if arguments.write:
        arguments.write.write_text("\n".join(text) + "\n")
    else:
        print("\n".join(text))


if __name__ == "__main__":
    main()

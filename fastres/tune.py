"""`fastres tune`: which kernel convolves each shape fastest on the present GPU, kept in a table.

The candidates are those of `fastres.kernels.choice`: Triton's fused kernel with every tile, cuDNN
with fastres's passes around it, and cuDNN's own fused kernels; in the backward each product by one
of them. Each is verified before it is timed.
The tables that ship are made here too, `--estimate` for an architecture without timing anything.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastres import models
from fastres.ops import reference
from fastres.ops._register import why_no_triton
from fastres.version import __version__

if TYPE_CHECKING:
    from fastres.kernels.choice import ConvKey

Run = Callable[[], object]
Timer = Callable[[Run], float]
EPS = 1e-5
# Of the cards whose tables ship: A100 and H100, both SXM.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
ABOUT = {
    True: "Measured by `fastres tune`: the fastest candidate that gave the right answer.",
    False: "Estimated, not measured: the largest tile that gives every multiprocessor a program "
    "(fastres.kernels.choice.default_choice), in the backward what the FLOPs and bytes say "
    "(fastres.kernels._estimate). `fastres tune` measures.",
}


class TuneError(ValueError):
    """Tuning cannot be done here, or not so; the message says why."""


@dataclass(frozen=True)
class TuneConfig:
    """Time every way to convolve each of a model's shapes on this GPU, and keep the fastest."""

    model: tuple[str, ...] = ("resnet18", "resnet50")
    """Members of the family."""

    size: int = 224
    """Side of the images; below 64 the models get the CIFAR stem."""

    infer: tuple[int, ...] = (1, 32, 256)
    """Batch sizes in inference."""

    train: tuple[int, ...] = (256,)
    """Batch sizes in training."""

    dtype: Literal["bf16", "fp16", "tf32"] = "bf16"
    """What the convolutions compute in; 16-bit types share their choices."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The table's file; left out: the one that fastres reads, in the user's cache."""

    estimate: Literal["none", "sm_80", "sm_90"] = "none"
    """Write the table for this architecture without timing anything; needs --out and no GPU."""

    def __post_init__(self) -> None:
        for name in self.model:
            if name not in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
                raise TuneError(f"model is {name!r}, expected resnet18, 34, 50, 101 or 152")
        for field in ("infer", "train"):
            if not all(n > 0 for n in getattr(self, field)):
                raise TuneError(f"{field} is {getattr(self, field)}, expected numbers above 0")
        if self.size < 32:
            raise TuneError(f"size is {self.size}, expected at least 32")
        if self.estimate != "none" and self.out is None:
            raise TuneError(f"estimate is {self.estimate!r}, expected --out FILE beside it")


# Shapes


class _Convolutions(TorchDispatchMode):
    """Collects the keys of the convolutions that pass through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: list[ConvKey] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        from fastres.kernels.choice import key_of

        name = func._schema.name.removeprefix("fastres::")
        if name == "conv_bn_relu":
            residual, (stride, padding, _, _, relu) = args[8], args[9:14]
            op = "conv_bn" + "_add" * (residual is not None) + "_relu" * relu
            self.keys.append(key_of(op, *args[:2], stride, padding))
        elif name == "conv_stats":
            op = "conv_stats" if args[2] is None else "bn_conv_stats"
            for name in (op, f"{op}_backward"):
                self.keys.append(key_of(name, *args[:2], args[7], args[8]))
        return func(*args, **(kwargs or {}))


def conv_keys(model: str, size: int, n: int, training: bool, dtype: torch.dtype) -> list[ConvKey]:
    """The convolutions, each once, of a fused model on images ``(n, 3, size, size)``.

    In training each is followed by its backward. The model passes over tensors without memory:
    nothing is computed.
    """
    with torch.device("meta"):
        stem = "cifar" if size < 64 else "imagenet"
        network = getattr(models, model)(fused=True, stem=stem).train(training)
        images = torch.empty(n, 3, size, size, dtype=dtype)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
    with _Convolutions() as found, torch.no_grad():
        network(images.to(memory_format=torch.channels_last))
    return list(dict.fromkeys(found.keys))


def keys_of(config: TuneConfig) -> list[ConvKey]:
    """The convolutions, each once, of everything that `config` names."""
    dtype = DTYPES[config.dtype]
    cases = [(n, False) for n in config.infer] + [(n, True) for n in config.train]
    return list(
        dict.fromkeys(
            key
            for model in config.model
            for n, training in cases
            for key in conv_keys(model, config.size, n, training, dtype)
        )
    )


# Contestants


def _arguments(key: ConvKey, dtype: torch.dtype, device: torch.device) -> tuple[str, list[Any]]:
    """The op's name and random arguments for a convolution, of the schema of the op."""

    def activation(*shape: int) -> Tensor:
        values = torch.randn(shape, device=device, dtype=dtype)
        return values.to(memory_format=torch.channels_last)

    def vectors(channels: int) -> list[Tensor]:
        mean, weight, bias = (torch.rand(channels, device=device) - 0.5 for _ in range(3))
        return [mean, torch.rand(channels, device=device) + 0.5, weight, bias]

    x = activation(key.n, key.c_in, key.height, key.width)
    weight = activation(key.c_out, key.c_in, *key.kernel)
    weight = weight / math.sqrt(key.c_in * math.prod(key.kernel))
    geometry = [list(key.stride), list(key.padding), [1, 1], 1]
    result = (key.n, key.c_out, *key.out_size)
    if "conv_stats" in key.op:
        before = vectors(key.c_in) if key.op.startswith("bn") else [None] * 4
        forward = [x, weight, *before, EPS, *geometry]
        if not key.op.endswith("backward"):
            return "conv_stats", forward
        dz, z = activation(*result), activation(*result)
        mean, _, dmean, dvar = vectors(key.c_out)
        arguments = [dz, dmean, dvar, *forward[:2], z, mean, *forward[2:], True, True]
        return "conv_stats_backward", arguments
    residual = activation(*result) if "add" in key.op else None
    relu = key.op.endswith("relu")
    arguments = [x, weight, None, *vectors(key.c_out), EPS, residual, *geometry, relu, None]
    return "conv_bn_relu", arguments


def _results(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error of the results."""
    pairs = zip(actual, exact, strict=True)
    found = [float((a.float() - e).norm() / e.norm().clamp_min(1e-30)) for a, e in pairs]
    return max(math.inf if math.isnan(error) else error for error in found)


def contestants(
    key: ConvKey, dtype: torch.dtype, device: torch.device, names: Iterable[str]
) -> dict[str, Run]:
    """The candidates of `names` that give the right answer, ready to be timed.

    Right: the relative error against plain torch in float32 is at most twice that of aten's
    convolution with fastres's passes, and a NaN of the input (backward: of dz) comes out.
    """
    from triton.runtime.errors import OutOfResources

    from fastres import kernels

    op, arguments = _arguments(key, dtype, device)
    launch = getattr(kernels, op)
    exact_arguments = [a.float() if isinstance(a, Tensor) else a for a in arguments]
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = _results(getattr(reference, op)(*exact_arguments))
    limit = 2 * _error(_results(launch(*arguments, "cudnn")), exact) + 1e-6
    poisoned = [arguments[0].clone(), *arguments[1:]]
    poisoned[0][0] = math.nan

    def is_right(name: str) -> bool:
        if _error(_results(launch(*arguments, name)), exact) > limit:
            return False
        results = _results(launch(*poisoned, name))
        # Of a gradient the weight's: ReLU's mask and strides leave zeros in the input's.
        middle = (..., key.kernel[0] // 2, key.kernel[1] // 2)
        touched = results[1][middle] if op.endswith("backward") else results[0][0]
        return bool(touched.isnan().all())

    found: dict[str, Run] = {}
    for name in names:
        try:
            right = is_right(name)
        except (
            RuntimeError,
            OutOfResources,
        ):  # cuDNN has no such kernel for the shape, or it does not fit the chip
            continue
        if right:
            found[name] = partial(launch, *arguments, name)
    return found


def median_seconds(run: Run) -> float:
    """Seconds of a run on the GPU: the median of many, each with a cold L2."""
    from triton.testing import do_bench

    milliseconds: float = do_bench(run, return_mode="median")
    return milliseconds / 1e3


# Tables


def fastest(
    keys: Iterable[ConvKey], contend: Callable[[ConvKey], Mapping[str, Run]], timer: Timer
) -> dict[ConvKey, dict[str, float]]:
    """For each key the seconds of every contestant, the fastest first; of equals, the earlier."""
    return {
        key: dict(sorted(times.items(), key=lambda item: item[1]))
        for key in keys
        if (times := {name: timer(run) for name, run in contend(key).items()})
    }


def estimates(keys: Iterable[ConvKey], dtype: torch.dtype, target: str) -> dict[ConvKey, str]:
    """The default choice for each key on an architecture's largest card."""
    from fastres.kernels.choice import default_choice

    return {key: default_choice(key, dtype, target, MULTIPROCESSORS[target]) for key in keys}


def write_table(
    path: Path,
    target: str,
    choices: Mapping[ConvKey, str],
    seconds: Mapping[ConvKey, Mapping[str, float]] | None = None,
    device: str | None = None,
) -> None:
    """Write a table at once: a reader finds the old one or the new one, whole."""
    content: dict[str, Any] = {
        "about": ABOUT[seconds is not None],
        "target": target,
        "measured": seconds is not None,
    }
    if seconds is not None:
        content["device"] = device
        content["versions"] = {"fastres": __version__, "torch": torch.__version__}
        content["date"] = datetime.date.today().isoformat()
        content["seconds"] = {str(key): dict(times) for key, times in seconds.items()}
    content["choices"] = {str(key): choice for key, choice in choices.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _merged(
    path: Path,
    target: str,
    choices: Mapping[ConvKey, str],
    seconds: Mapping[ConvKey, Mapping[str, float]] | None,
) -> tuple[dict[ConvKey, str], dict[ConvKey, Mapping[str, float]] | None]:
    """The new choices and times over those that the file at `path` has of the same kind."""
    from fastres.kernels.choice import ConvKey, read_table

    try:
        before = read_table(path) if path.exists() else None
    except ValueError as error:
        raise TuneError(str(error)) from None
    if before is None or before.target != target or before.measured != (seconds is not None):
        return dict(choices), None if seconds is None else dict(seconds)
    if seconds is not None:
        earlier = json.loads(path.read_text())["seconds"]
        seconds = {**{ConvKey.parse(key): times for key, times in earlier.items()}, **seconds}
    return {**before.choices, **choices}, seconds


def tune(config: TuneConfig, timer: Timer = median_seconds) -> Path:
    """Do what `config` asks for; returns the table's file. Other shapes in it stay as they are.

    Raises:
        TuneError: there is no GPU, or no Triton, or the file is there and no table.
        OSError: the file cannot be written.
    """
    dtype = DTYPES[config.dtype]
    tf32 = torch.backends.cudnn.flags(benchmark=True, allow_tf32=config.dtype == "tf32")
    if config.estimate != "none" and config.out is not None:
        with tf32:
            chosen = estimates(keys_of(config), dtype, config.estimate)
        write_table(
            config.out, config.estimate, *_merged(config.out, config.estimate, chosen, None)
        )
        return config.out
    reason = why_no_triton()
    if reason is not None:
        raise TuneError(f"tuning needs a GPU: {reason}")
    from fastres.kernels import choice

    device = torch.device("cuda", torch.cuda.current_device())
    target, name = choice.target_of(device), torch.cuda.get_device_name(device)
    path = config.out or choice.stored_path(name)

    def contend(key: ConvKey) -> Mapping[str, Run]:
        try:
            return contestants(key, dtype, device, choice.candidates(key, dtype, target))
        except torch.OutOfMemoryError:  # too large for this card: the default stays
            return {}

    with tf32:
        keys = track(keys_of(config), "tuning", console=Console(stderr=True))
        seconds = fastest(keys, contend, timer)
    chosen = {key: next(iter(times)) for key, times in seconds.items()}
    write_table(path, target, *_merged(path, target, chosen, seconds), name)
    choice.forget_tables()
    return path


def main(config: TuneConfig) -> None:
    """Tune, and print what was chosen."""
    from fastres.kernels.choice import read_table

    path = tune(config)
    table = Table("convolution", "choice", title=str(path), title_justify="left")
    for key, chosen in read_table(path).choices.items():
        table.add_row(str(key), chosen)
    Console().print(table)


# What `fastres env` shows: the same typical shapes as on the CPU.


def typical_choices() -> list[tuple[str, str, str]]:
    """For typical convolutions in bfloat16: the shape, who computes it on CUDA, and why.

    Raises:
        ValueError: a variable or a table says what cannot be; the message names it.
    """
    from fastres.kernels import choice

    device = torch.device("cuda", torch.cuda.current_device())
    keys = [*conv_keys("resnet50", 224, 256, True, torch.bfloat16)[:12]]
    keys += conv_keys("resnet18", 224, 1, False, torch.bfloat16)[:6]
    return [(str(key), *choice.explain(key, torch.bfloat16, device)) for key in keys]

"""Who computes a convolution on a GPU: the candidates, and the tables that choose among them.

A table holds a choice for each shape. The first that has the shape decides: the file that
FASTRES_GPU_TABLE names, what `fastres tune` stored for this card, what ships for its architecture.
Where none has it, the largest tile does that gives every multiprocessor a program.
"""

import functools
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ._estimate import default_backward, default_tile, programs
from ._tiles import CONV_TILES, GRADIENTS, STEM_TILES

# The interpreter runs whatever this architecture would.
INTERPRETED = "sm_90"
SHIPPED = Path(__file__).parent / "tuned"
VARIABLES = ("FASTRES_GPU_CONV", "FASTRES_GPU_TABLE")
BACKWARD_OPS = ("conv_stats_backward", "bn_conv_stats_backward")
OPS = (
    *("conv_bn_relu", "conv_bn_add_relu", "conv_bn", "conv_bn_add", "conv_stats", "bn_conv_stats"),
    *BACKWARD_OPS,
)
CUDNN_FUSED = {"conv_bn_relu": "cudnn_relu", "conv_bn_add_relu": "cudnn_add_relu"}


def tile_fits(name: str, dtype: torch.dtype, prologue: bool, target: str) -> bool:
    """Whether a tile's registers and shared memory suffice: the wide one has none left for more."""
    if name != "wide":
        return True
    large = target in ("sm_90", "sm_100", "sm_103", "gfx942")
    return large and dtype.itemsize == 2 and not prologue


@functools.cache
def target_of(device: torch.device) -> str:
    """The architecture that Triton compiles for: "sm_90", "gfx942", ..."""
    if device.type != "cuda":
        return INTERPRETED
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def has_tensor_cores(target: str, precision: str) -> bool:
    """Whether the kernels were made for the tensor cores of an architecture."""
    if target.startswith("gfx"):
        return target == "gfx942" and precision == "16-bit"
    return precision in ("16-bit", "tf32") and int(target.removeprefix("sm_")) >= 80


def has_tma(target: str) -> bool:
    """Whether an architecture has a tensor memory accelerator."""
    return target.startswith("sm_") and int(target.removeprefix("sm_")) >= 90


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision_of(dtype: torch.dtype) -> str:
    """What a convolution of that dtype computes in, as torch's switches say."""
    if dtype in (torch.float16, torch.bfloat16):
        return "16-bit"
    if dtype == torch.float32:
        return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "fp32"
    return "fp64"


class ConvKey(NamedTuple):
    """What a choice depends on: the op, its precision and its sizes; no groups, no dilation."""

    op: str  # one of OPS; bn_conv_stats applies the BatchNorm before to its input
    precision: str
    n: int
    c_in: int
    height: int
    width: int
    c_out: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = (
            (size + 2 * self.padding[i] - self.kernel[i]) // self.stride[i] + 1
            for i, size in enumerate((self.height, self.width))
        )
        return height, width

    @property
    def rows(self) -> int:
        """Pixels of the output in the whole batch."""
        return self.n * math.prod(self.out_size)

    def __str__(self) -> str:
        kernel, stride, padding = ("x".join(map(str, pair)) for pair in self[7:])
        return (
            f"{self.op} {self.precision} input {self.n}x{self.c_in}x{self.height}x{self.width} "
            f"weight {self.c_out}x{self.c_in}x{kernel} stride {stride} padding {padding}"
        )

    @staticmethod
    def parse(text: str) -> "ConvKey":
        """The inverse of str(). Raises ValueError where the text is none."""
        words = text.split(" ")
        try:
            n, c_in, height, width = (int(x) for x in words[3].split("x"))
            c_out, _, *kernel = (int(x) for x in words[5].split("x"))
            stride, padding = (tuple(int(x) for x in words[i].split("x")) for i in (7, 9))
            key = ConvKey(
                words[0], words[1], n, c_in, height, width, c_out, tuple(kernel), stride, padding
            )
        except (IndexError, ValueError):
            raise ValueError(f"{text!r} is no convolution's key") from None
        if str(key) != text or key.op not in OPS:
            raise ValueError(f"{text!r} is no convolution's key")
        return key


def is_stem(key: ConvKey) -> bool:
    """Whether a convolution has so few channels that a line of its kernel is loaded as one tap."""
    return (
        key.c_in % 16 != 0
        and key.c_in * key.kernel[1] <= 64
        and not key.op.startswith("bn_")
        and key.op not in BACKWARD_OPS
    )


def key_of(
    op: str, input: Tensor, weight: Tensor, stride: list[int], padding: list[int]
) -> ConvKey:
    """The key of a convolution of ``(N, Ci, H, W)`` with ``(Co, Ci, kh, kw)``."""
    n, c_in, height, width = input.shape
    c_out, _, *kernel = weight.shape
    precision = precision_of(input.dtype)
    sizes = (n, c_in, height, width, c_out, tuple(kernel))
    return ConvKey(op, precision, *sizes, tuple(stride), tuple(padding))


def candidates(key: ConvKey, dtype: torch.dtype, target: str) -> list[str]:
    """Every way to compute a convolution without groups and dilation, the default ones first.

    "triton:TILE" is the fused kernel, "tma:TILE" its persistent variant for 1x1 convolutions, which
    loads by TMA, "cudnn" aten's convolution with fastres's passes around it, "cudnn_relu" and
    "cudnn_add_relu" cuDNN's own fused ones, on a weight that BatchNorm's scale is multiplied into
    at every call. float16 has not the range for that. A stem's default is cuDNN.

    Of a backward op they are those of GRADIENTS: "triton:DGRAD+WGRAD" names the tiles of both
    products, "triton_apply" the same where the products apply the statistics' gradient, "dgrad" and
    "wgrad" the one of the two that is ours.
    """
    found = []
    # 16 channels keep every row of a tile 16-byte aligned: asynchronous copies, no spills.
    outside = key.n > 0 and key.c_out > 0 and key.c_out % 16 == 0
    outside = outside and has_tensor_cores(target, key.precision)
    fits = outside and key.c_in > 0 and key.c_in % 16 == 0
    if key.op in BACKWARD_OPS:
        # With more taps than one dz and z would be read and joined again for each.
        pointwise = key.kernel == (1, 1)
        ours = [name for name, how in GRADIENTS.items() if pointwise or not how.apply]
        return ours if fits else ["cudnn"]
    if fits:
        prologue = key.op == "bn_conv_stats"
        tiles = [name for name in CONV_TILES if tile_fits(name, dtype, prologue, target)]
        found += [f"triton:{name}" for name in tiles]
        pointwise = key[7:] == ((1, 1), (1, 1), (0, 0))
        if pointwise and key.precision == "16-bit" and has_tma(target):
            found += [f"tma:{name}" for name in CONV_TILES]
    found.append("cudnn")
    if key.op in CUDNN_FUSED and target.startswith("sm_") and dtype != torch.float16:
        found.append(CUDNN_FUSED[key.op])
    if outside and is_stem(key):
        found += [f"triton:{name}" for name in STEM_TILES]
    return found


def default_choice(
    key: ConvKey, dtype: torch.dtype, target: str, enough: int, *, ours: bool = False
) -> str:
    """The largest tile that fits and gives each of `enough` multiprocessors a program.

    Of a backward op what is estimated to take the least time, with `ours` among Triton's alone.
    """
    possible = candidates(key, dtype, target)
    if possible[0] == "cudnn":
        return possible[-1] if ours and possible[-1].startswith("triton") else "cudnn"
    if key.op in BACKWARD_OPS:
        return default_backward(key, possible, target, enough, ours)
    wide = "triton:wide" in possible and key.c_out % 256 == 0
    if wide and programs("wide", key.rows, key.c_out) >= 2 * enough:
        return "triton:wide"
    return f"triton:{default_tile(key.rows, key.c_out, enough)}"


class Table(NamedTuple):
    """Choices by shape, and where they come from."""

    path: Path
    target: str
    measured: bool
    choices: dict[ConvKey, str]


def read_table(path: Path) -> Table:
    """Raises ValueError, which names the file and what is wrong with it, or OSError."""
    try:
        content = json.loads(path.read_text())
        target, measured = content["target"], content["measured"]
        choices = {ConvKey.parse(key): choice for key, choice in content["choices"].items()}
        if not (isinstance(target, str) and isinstance(measured, bool)):
            raise ValueError("target must be a string and measured true or false")
        for key, choice in choices.items():
            if choice not in _KNOWN:
                raise ValueError(f"{choice!r} is no candidate, for {key}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no table of convolutions ({error}): remove it, then run `fastres tune`"
        ) from None
    return Table(path, target, measured, choices)


_KNOWN = {f"{kernel}:{name}" for kernel in ("triton", "tma") for name in CONV_TILES}
_KNOWN |= {*CUDNN_FUSED.values(), *GRADIENTS}


def stored_path(device_name: str) -> Path:
    """Where `fastres tune` stores a card's table: under $XDG_CACHE_HOME, or ~/.cache."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastres"
    slug = "".join(c if c.isalnum() else "-" for c in device_name.lower())
    return folder / f"conv-{slug}.json"


@functools.cache
def _read(path: Path) -> Table | None:
    return read_table(path) if path.exists() else None


@functools.cache
def _stored(device: torch.device) -> Path | None:
    return stored_path(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def tables(device: torch.device) -> list[Table]:
    """The tables for a device, the first to ask first.

    Raises:
        ValueError: FASTRES_GPU_TABLE names a file that is missing, damaged, or another
            architecture's; or the stored table is damaged.
    """
    asked = os.environ.get("FASTRES_GPU_TABLE", "")
    if asked == "none":
        return []
    target = target_of(device)
    found = []
    if asked:
        table = _read(Path(asked))
        if table is None:
            raise ValueError(f"FASTRES_GPU_TABLE is {asked!r}, expected a file, or none")
        if table.target != target:
            raise ValueError(f"FASTRES_GPU_TABLE is a table for {table.target}, expected {target}")
        found.append(table)
    elif (stored := _stored(device)) is not None:
        found.append(_read(stored))
    found.append(_read(SHIPPED / f"{target}.json"))
    return [table for table in found if table is not None]


def forget_tables() -> None:
    """Read the files again at the next choice."""
    _read.cache_clear()
    _remembered.cache_clear()


def explain(key: ConvKey, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """The candidate that computes a convolution as things are, and why that one.

    Raises:
        ValueError: a variable of the environment has a value that cannot be; it names it.
    """
    asked = os.environ.get("FASTRES_GPU_CONV", "auto")
    if asked not in ("auto", "triton", "cudnn"):
        raise ValueError(f"FASTRES_GPU_CONV is {asked!r}, expected 'triton', 'cudnn' or 'auto'")
    target = target_of(device)
    possible = candidates(key, dtype, target)
    if asked == "cudnn":
        return "cudnn", "FASTRES_GPU_CONV"
    for table in tables(device):
        choice = table.choices.get(key)
        if choice in possible and (asked == "auto" or choice.startswith(("triton", "tma"))):
            return choice, f"{'measured' if table.measured else 'estimated'}: {table.path}"
    ours = asked == "triton"
    choice = default_choice(key, dtype, target, multiprocessors(device), ours=ours)
    return choice, "no table has this shape" if choice != "cudnn" else "no other kernel fits"


def choose_conv(
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    op: str,
) -> str:
    """The candidate that computes an op of OPS; see `candidates` and `explain`.

    FASTRES_GPU_CONV=triton or cudnn overrides the tables where Triton's kernel fits: 16-bit, or
    float32 where torch allows TF32 in convolutions; no groups, no dilation, channels in sixteens.
    """
    key = key_of(op, input, weight, stride, padding)
    asked = (os.environ.get(name) for name in VARIABLES)
    choice = _remembered(key, input.dtype, input.device, *asked)
    if groups != 1 or any(d != 1 for d in dilation) or input.dtype == torch.float64:
        return "cudnn"
    return choice


@functools.lru_cache(maxsize=4096)
def _remembered(key: ConvKey, dtype: torch.dtype, device: torch.device, *asked: str | None) -> str:
    """explain's choice while VARIABLES are as `asked`: looking it up takes as long as a launch."""
    return explain(key, dtype, device)[0]

"""What is chosen unmeasured: by the number of programs, and in the backward by FLOPs and bytes."""

import math
from typing import TYPE_CHECKING

import triton

from ._tiles import CONV_TILES, GRADIENTS, Gradients

if TYPE_CHECKING:
    from .choice import ConvKey

# FLOPs in the time that moves an element of 2 bytes, or in TF32 of 4: from the data sheets of
# A100, H100 and MI300X.
FLOPS_PER_ELEMENT = {"sm_80": 306.0, "sm_90": 590.0, "gfx942": 493.0}
# Assumed, not measured: our products' FLOP/s beside cuDNN's, and L2's bytes/s beside the memory's.
OUR_SPEED = 0.7
L2_SPEED = 2.0
# Of cuDNN's estimated time what ours may take to be the choice unmeasured.
UNMEASURED_GAIN = 0.9


def programs(name: str, rows: int, columns: int) -> int:
    """How many tiles of that name cover rows and columns."""
    tile = CONV_TILES[name]
    return triton.cdiv(rows, tile.block_rows) * triton.cdiv(columns, tile.block_columns)


def default_tile(rows: int, columns: int, enough: int) -> str:
    """The largest of three tiles that gives each of `enough` multiprocessors a program."""
    if columns > 64 and programs("square", rows, columns) >= enough:
        return "square"
    return "tall" if programs("tall", rows, columns) >= enough else "small"


def default_backward(
    key: "ConvKey", possible: list[str], target: str, enough: int, ours: bool
) -> str:
    """Of the candidates `possible` the one estimated to be fastest; `ours`: of Triton's alone."""
    dgrad = default_tile(key.n * key.height * key.width, key.c_in, enough)
    # The depth of the weight's gradient is split: its tile need not leave programs for all.
    wgrad = "small" if key.c_out < 128 else "square" if key.c_in >= 128 else "tall"
    both = f"triton:{dgrad}+{wgrad}"
    ridge = FLOPS_PER_ELEMENT.get(target)
    if ridge is None:
        return both if ours else "cudnn"
    names = [f"triton_apply:{dgrad}+{wgrad}", both]
    if not ours:
        names += [f"dgrad:{dgrad}", f"wgrad:{wgrad}"]
    times = {
        name: backward_estimate(key, GRADIENTS[name], ridge) for name in names if name in possible
    }
    if not ours:
        times["cudnn"] = UNMEASURED_GAIN * backward_estimate(key, GRADIENTS["cudnn"], ridge)
    return min(times, key=times.__getitem__)


def backward_estimate(key: "ConvKey", how: Gradients, ridge: float) -> float:
    """The time of a backward op in that of moving an element, at the ceilings of a card.

    Each kernel takes what its FLOPs or its bytes take, whichever is more; ours do their FLOPs at
    OUR_SPEED, and what their tiles load comes through L2. `ridge` is one of FLOPS_PER_ELEMENT.
    """
    z, x = key.rows * key.c_out, key.n * key.height * key.width * key.c_in
    products = math.prod(key.kernel) * key.c_in * z
    flops = 2 * products / ridge
    # A stride larger than the kernel leaves pixels of the input unread.
    read = min(x, math.prod(key.kernel) * key.rows * key.c_in)
    prologue = key.op == "bn_conv_stats_backward"
    reads_of_dz = 2 if how.apply else 1

    def ours(name: str, moved: int) -> float:
        tile = CONV_TILES[name]
        loaded = products * (reads_of_dz / tile.block_columns + 1 / tile.block_rows)
        return max(flops / OUR_SPEED, moved, loaded / L2_SPEED)

    total = 0.0 if how.apply else 3.0 * z
    if how.dgrad is not None:
        total += ours(how.dgrad, reads_of_dz * z + x + x * prologue)
    else:
        # A pass masks and sums: it reads the gradient and the input, and writes.
        total += max(flops, z + x) + 3 * x * prologue
    if how.wgrad is not None:
        return total + ours(how.wgrad, reads_of_dz * z + read)
    # A pass writes the activation.
    return total + max(flops, z + read) + 2 * x * prologue

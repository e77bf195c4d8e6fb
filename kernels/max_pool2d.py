"""Max-pool, with the previous BatchNorm and ReLU before it; no indices are kept.

The backward finds each window's maximum again, then every pixel gathers from the windows around it:
no atomics, the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    accumulator,
    channels_last,
    empty_channels_last,
    is_wide,
    parameter_dtype,
    require,
    row_tile,
    rows_of,
    vectors,
)
from .bn_add_relu import bn_add_relu_gradients, channel_scale


@triton.jit
def max_pool2d_fwd_kernel(
    input,  # (N, H, W, C)
    in_mean,  # (C,) of the prologue, or None for no prologue
    in_var,  # (C,) or None
    in_weight,  # (C,) or None for 1
    in_bias,  # (C,) or None for 0
    output,  # (N, OH, OW, C) dtype of input, or None
    taps,  # (N, OH, OW, C) integers: which of a window's elements is its maximum, or None
    rows,  # N * OH * OW
    height,
    width,
    out_height,
    out_width,
    channels,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    IN_EPS: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    row = (tl.program_id(0) // channel_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = (tl.program_id(0) % channel_blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    c_mask = c < channels
    row_mask = row < rows
    top = (row // out_width) % out_height * STRIDE_H - PADDING_H
    left = row % out_width * STRIDE_W - PADDING_W
    image = row // (out_width * out_height)
    if WIDE:
        image = image.to(tl.int64)
        row = row.to(tl.int64)
    if in_mean is not None:
        center = tl.load(in_mean + c, mask=c_mask, other=0.0).to(ACC)[None, :]
        scale = channel_scale(in_var, in_weight, c, c_mask, IN_EPS, ACC)[None, :]
        shift = tl.zeros((1, BLOCK_CHANNELS), dtype=ACC)
        if in_bias is not None:
            shift = tl.load(in_bias + c, mask=c_mask, other=0.0).to(ACC)[None, :]

    best = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=ACC)
    chosen = tl.full((BLOCK_ROWS, BLOCK_CHANNELS), -1, dtype=tl.int32)
    for tap in range(0, KERNEL_H * KERNEL_W):
        y = top + tap // KERNEL_W
        x = left + tap % KERNEL_W
        inside = row_mask & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        mask = inside[:, None] & c_mask[None, :]
        offset = ((image * height + y) * width + x)[:, None] * channels + c[None, :]
        value = tl.load(input + offset, mask=mask, other=0.0).to(ACC)
        if in_mean is not None:
            value = (value - center) * scale + shift
            value = tl.where(value < 0, 0.0, value)
        # As torch: a NaN is a maximum, of equal values the first.
        better = inside[:, None] & ((chosen < 0) | (value > best) | (value != value))
        best = tl.where(better, value, best)
        chosen = tl.where(better, tap, chosen)

    mask = row_mask[:, None] & c_mask[None, :]
    offset = row[:, None] * channels + c[None, :]
    if output is not None:
        tl.store(output + offset, best.to(output.dtype.element_ty), mask=mask)
    if taps is not None:
        tl.store(taps + offset, chosen.to(taps.dtype.element_ty), mask=mask)


@triton.jit
def max_pool2d_bwd_kernel(
    dy,  # (N, OH, OW, C)
    taps,  # (N, OH, OW, C) integers
    dinput,  # (N, H, W, C) dtype of dy
    rows,  # N * H * W
    height,
    width,
    out_height,
    out_width,
    channels,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    row = (tl.program_id(0) // channel_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = (tl.program_id(0) % channel_blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    c_mask = c < channels
    row_mask = row < rows
    y = (row // width) % height + PADDING_H
    x = row % width + PADDING_W
    image = row // (width * height)
    if WIDE:
        image = image.to(tl.int64)
        row = row.to(tl.int64)

    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=ACC)
    windows_h: tl.constexpr = (KERNEL_H + STRIDE_H - 1) // STRIDE_H
    windows_w: tl.constexpr = (KERNEL_W + STRIDE_W - 1) // STRIDE_W
    for window in range(0, windows_h * windows_w):
        out_y = y // STRIDE_H - window // windows_w
        out_x = x // STRIDE_W - window % windows_w
        tap_h = y - out_y * STRIDE_H
        tap_w = x - out_x * STRIDE_W
        inside = row_mask & (tap_h < KERNEL_H) & (tap_w < KERNEL_W)
        inside = inside & (out_y >= 0) & (out_y < out_height) & (out_x >= 0) & (out_x < out_width)
        mask = inside[:, None] & c_mask[None, :]
        offset = ((image * out_height + out_y) * out_width + out_x)[:, None] * channels + c[None, :]
        chosen = tl.load(taps + offset, mask=mask, other=0).to(tl.int32)
        mask = mask & (chosen == (tap_h * KERNEL_W + tap_w)[:, None])
        total += tl.load(dy + offset, mask=mask, other=0.0).to(ACC)
    mask = row_mask[:, None] & c_mask[None, :]
    offset = row[:, None] * channels + c[None, :]
    tl.store(dinput + offset, total.to(dinput.dtype.element_ty), mask=mask)


def _prologue(
    op: str,
    input: Tensor,
    in_mean: Tensor | None,
    in_var: Tensor | None,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
) -> list[Tensor | None]:
    require(input.dim() == 4, op, f"input has {input.dim()} dimensions, expected 4")
    require((in_mean is None) == (in_var is None), op, "in_mean and in_var must be given together")
    named = {"in_mean": in_mean, "in_var": in_var, "in_weight": in_weight, "in_bias": in_bias}
    return vectors(op, input, input.shape[1], **named)


def _output_size(
    input: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]
) -> tuple[int, int, int, int]:
    height, width = (
        (input.shape[2 + i] + 2 * padding[i] - kernel_size[i]) // stride[i] + 1 for i in range(2)
    )
    return input.shape[0], input.shape[1], height, width


def _launch(
    kernel: triton.JITFunction,
    tensors: list[Tensor | None],
    large: Tensor,
    small: Tensor,
    written: Tensor,
    geometry: tuple[list[int], list[int], list[int]],
    **constants: object,
) -> None:
    """Launch over the pixels of `written`; large is the pool's input, small its output."""
    kernel_size, stride, padding = geometry
    channels, rows = large.shape[1], rows_of(written)
    tile = row_tile(channels, 2048)
    grid = (triton.cdiv(rows, tile.block_rows) * triton.cdiv(channels, tile.block_channels),)
    if not written.numel():
        return
    with torch.cuda.device_of(large):
        kernel[grid](
            *tensors,
            rows,
            large.shape[2],
            large.shape[3],
            small.shape[2],
            small.shape[3],
            channels,
            KERNEL_H=kernel_size[0],
            KERNEL_W=kernel_size[1],
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            PADDING_H=padding[0],
            PADDING_W=padding[1],
            ACC=accumulator(large.dtype),
            WIDE=is_wide(large) or is_wide(small),
            BLOCK_ROWS=tile.block_rows,
            BLOCK_CHANNELS=tile.block_channels,
            num_warps=8,
            enable_fp_fusion=True,
            **constants,
        )


def max_pool2d(
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    in_mean: Tensor | None,
    in_var: Tensor | None,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    in_eps: float,
) -> Tensor:
    """Each window's maximum of relu(bn(input)), without in_mean of the input as it is.

    input is ``(N, C, H, W)``, the vectors ``(C,)``; returns ``(N, C, OH, OW)``, channels_last.
    Raises RuntimeError where shapes or devices do not fit.
    """
    prologue = _prologue("max_pool2d", input, in_mean, in_var, in_weight, in_bias)
    input = channels_last(input)
    output = empty_channels_last(input, _output_size(input, kernel_size, stride, padding))
    geometry = (kernel_size, stride, padding)
    tensors = [input, *prologue, output, None]
    _launch(max_pool2d_fwd_kernel, tensors, input, output, output, geometry, IN_EPS=in_eps)
    return output


def max_pool2d_backward(
    dy: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    in_mean: Tensor | None,
    in_var: Tensor | None,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    in_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of max_pool2d's input and the prologue's statistics and parameters.

    Returns dinput, din_mean, din_var, din_weight, din_bias; what does not apply is empty ``(0,)``.
    Raises RuntimeError where shapes, dtypes or devices do not fit.
    """
    op = "max_pool2d_backward"
    prologue = _prologue(op, input, in_mean, in_var, in_weight, in_bias)
    size = _output_size(input, kernel_size, stride, padding)
    same = tuple(dy.shape) == size and dy.dtype == input.dtype and dy.device == input.device
    require(same, op, f"dy is {dy.dtype} {tuple(dy.shape)}, expected {input.dtype} {size}")
    dy, input = channels_last(dy), channels_last(input)
    small = kernel_size[0] * kernel_size[1] <= 256
    taps = torch.empty_like(dy, dtype=torch.uint8 if small else torch.int32)
    geometry = (kernel_size, stride, padding)
    tensors = [input, *prologue, None, taps]
    _launch(max_pool2d_fwd_kernel, tensors, input, dy, dy, geometry, IN_EPS=in_eps)
    g = empty_channels_last(input, input.shape)
    _launch(max_pool2d_bwd_kernel, [dy, taps, g], input, dy, input, geometry)
    vector = dy.new_empty(0, dtype=parameter_dtype(input.dtype))
    absent = [torch.empty_like(vector) for _ in range(4)]
    if in_mean is None:
        return (g, *absent)
    none = (None,) * 4
    gradients = bn_add_relu_gradients(g, None, input, *prologue, in_eps, *none, 0.0, True)[:5]
    if in_bias is None:
        return (*gradients[:4], absent[3])
    return gradients

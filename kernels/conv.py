"""Convolution fused with BatchNorm: implicit GEMM on channels_last tensors.

Rows are output pixels (N*OH*OW), columns output channels, the depth kh*kw*Ci. In inference the
epilogue applies BatchNorm, residual and ReLU; in training the prologue applies the previous layer's
BatchNorm and ReLU as the input is loaded, and the epilogue yields each channel's statistics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._conv_parts import GROUP_ROWS, activation_before, conv_epilogue, grouped_tile
from ._launch import (
    channels_last,
    deterministic_cudnn,
    empty_channels_last,
    is_wide,
    parameter_dtype,
    require,
    require_like,
    rows_of,
    vectors,
)
from ._tiles import ConvTile, conv_tile, tile_of_8_warps
from .bn_add_relu import bn_add_relu, channel_scale
from .channel_stats import channel_stats, merge_stats
from .choice import CUDNN_FUSED, choose_conv, target_of
from .conv_1x1 import launch_conv_1x1

FOLD_BLOCK = 1024


@triton.jit(
    do_not_specialize=["rows", "height", "width", "out_height", "out_width"],
)
def conv_fwd_kernel(
    input,  # (N, H, W, Ci)
    weight,  # (Co, KH, KW, Ci) dtype of input
    output,  # (N, OH, OW, Co) dtype of input
    in_mean,  # (Ci,) of the prologue, or None for no prologue
    in_var,  # (Ci,) or None
    in_weight,  # (Ci,) or None for 1
    in_bias,  # (Ci,) or None for 0
    running_mean,  # (Co,) of the inference epilogue, or None in training
    running_var,  # (Co,) or None
    bias,  # (Co,) of the convolution, or None for 0
    bn_weight,  # (Co,) or None for 1
    bn_bias,  # (Co,) or None for 0
    residual,  # (N, OH, OW, Co) dtype of input, or None
    part_mean,  # (ceil(rows / BLOCK_ROWS), Co) float32 of the training epilogue, or None
    part_m2,  # (ceil(rows / BLOCK_ROWS), Co) float32, or None
    rows,  # N * OH * OW
    height,
    width,
    in_channels,
    out_height,
    out_width,
    out_channels,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    IN_EPS: tl.constexpr,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    LINES: tl.constexpr,  # a line of the kernel and its channels are one tap: for few channels
    EVEN_DEPTH: tl.constexpr,  # a tap's channels are a multiple of BLOCK_DEPTH
    WIDE: tl.constexpr,  # offsets need 64 bits
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    row_block, column_block = grouped_tile(
        tl.program_id(0),
        tl.cdiv(rows, BLOCK_ROWS),
        tl.cdiv(out_channels, BLOCK_COLUMNS),
        GROUP_ROWS,
    )
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = row < rows
    column_mask = column < out_channels
    top = (row // out_width) % out_height * STRIDE_H - PADDING_H
    left = row % out_width * STRIDE_W - PADDING_W
    image = row // (out_width * out_height)
    if WIDE:
        image = image.to(tl.int64)
    pixel = ((image * height + top) * width + left) * in_channels
    depth = KERNEL_H * KERNEL_W * in_channels

    # Taps run fastest: the same lines of the input serve KERNEL_H * TAPS_W steps.
    TAPS_W: tl.constexpr = 1 if LINES else KERNEL_W
    taps: tl.constexpr = KERNEL_H * TAPS_W
    tap_channels = KERNEL_W // TAPS_W * in_channels
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for step in range(0, taps * tl.cdiv(tap_channels, BLOCK_DEPTH)):
        tap = step % taps
        tap_h = tap // TAPS_W
        tap_w = tap % TAPS_W
        c = step // taps * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
        a_mask = row_mask
        if PADDING_H > 0:
            a_mask = a_mask & (top + tap_h >= 0) & (top + tap_h < height)
        if PADDING_W > 0 and not LINES:
            a_mask = a_mask & (left + tap_w >= 0) & (left + tap_w < width)
        a_mask = a_mask[:, None]
        b_mask = column_mask[None, :]
        if LINES:
            x = left[:, None] + (c // in_channels)[None, :]
            a_mask = a_mask & (x >= 0) & (x < width)
        if not EVEN_DEPTH:
            a_mask = a_mask & (c < tap_channels)[None, :]
            b_mask = b_mask & (c < tap_channels)[:, None]
        a_offset = pixel[:, None] + ((tap_h * width + tap_w) * in_channels + c)[None, :]
        a = tl.load(input + a_offset, mask=a_mask, other=0.0)
        if in_mean is not None:
            a = activation_before(
                a, a_mask, c, in_channels, in_mean, in_var, in_weight, in_bias, IN_EPS
            )
        b_offset = column[None, :] * depth + (tap * tap_channels + c)[:, None]
        b = tl.load(weight + b_offset, mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="tf32")

    conv_epilogue(
        acc,
        row_block,
        column_block,
        output,
        running_mean,
        running_var,
        bias,
        bn_weight,
        bn_bias,
        residual,
        part_mean,
        part_m2,
        rows,
        out_channels,
        EPS,
        RELU,
        WIDE,
    )


@triton.jit
def fold_bn_kernel(
    weight,  # (out_channels, depth)
    running_mean,  # (out_channels,)
    running_var,  # (out_channels,)
    bias,  # (out_channels,) of the convolution, or None for 0
    bn_weight,  # (out_channels,) or None for 1
    bn_bias,  # (out_channels,) or None for 0
    folded,  # (out_channels, depth) dtype of weight
    shift,  # (out_channels,) dtype of weight
    depth,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0)
    scale = channel_scale(running_var, bn_weight, channel, True, EPS, tl.float32)
    offset = -tl.load(running_mean + channel).to(tl.float32)
    if bias is not None:
        offset += tl.load(bias + channel).to(tl.float32)
    offset *= scale
    if bn_bias is not None:
        offset += tl.load(bn_bias + channel).to(tl.float32)
    tl.store(shift + channel, offset.to(shift.dtype.element_ty))
    for start in range(0, depth, BLOCK):
        d = start + tl.arange(0, BLOCK)
        value = tl.load(weight + channel * depth + d, mask=d < depth, other=0.0).to(tl.float32)
        value = (value * scale).to(folded.dtype.element_ty)
        tl.store(folded + channel * depth + d, value, mask=d < depth)


def fold_bn(weight: Tensor, epilogue: list[Tensor | None], eps: float) -> tuple[Tensor, Tensor]:
    """The weight times BatchNorm's scale, and its shift ``(Co,)``, in the weight's dtype."""
    weight = channels_last(weight)
    folded = torch.empty_like(weight)
    channels = weight.shape[0]
    shift = weight.new_empty((channels,))
    with torch.cuda.device_of(weight):
        fold_bn_kernel[(channels,)](
            weight,
            *epilogue,
            folded,
            shift,
            weight[0].numel(),
            EPS=eps,
            BLOCK=FOLD_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return folded, shift


def _cudnn_fused(
    input: Tensor,
    weight: Tensor,
    epilogue: list[Tensor | None],
    eps: float,
    residual: Tensor | None,
    *geometry: object,
) -> Tensor:
    # Folded anew in every call, so that no change of a parameter can be missed.
    folded, shift = fold_bn(weight, epilogue, eps)
    input = channels_last(input)
    if residual is None:
        output = torch.cudnn_convolution_relu(input, folded, shift, *geometry)
    else:
        residual = channels_last(residual)
        output = torch.cudnn_convolution_add_relu(input, folded, residual, 1.0, shift, *geometry)
    return channels_last(output)


def _aten_convolution(input: Tensor, weight: Tensor, *geometry: object) -> Tensor:
    stride, padding, dilation, groups = geometry
    with deterministic_cudnn():
        z: Tensor = torch.ops.aten.convolution(
            channels_last(input), weight, None, stride, padding, dilation, False, [0, 0], groups
        )
    return z


def _output_shape(
    op: str,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[int, int, int, int]:
    require(input.dim() == 4, op, f"input has {input.dim()} dimensions, expected 4")
    require(weight.dim() == 4, op, f"weight has {weight.dim()} dimensions, expected 4")
    same = input.dtype == weight.dtype and input.device == weight.device
    require(
        same,
        op,
        f"weight is {weight.dtype} on {weight.device}, expected {input.dtype} on {input.device}",
    )
    require(
        input.shape[1] == weight.shape[1] * groups,
        op,
        f"input has {input.shape[1]} channels, expected {weight.shape[1] * groups}",
    )
    size = [
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1)
        // stride[i]
        + 1
        for i in range(2)
    ]
    require(min(size) > 0, op, f"output would be {size[0]} x {size[1]}, expected at least 1 x 1")
    return input.shape[0], weight.shape[0], size[0], size[1]


def _launch(
    choice: str,
    tile: ConvTile,
    tensors: tuple[Tensor, Tensor, Tensor],
    prologue: list[Tensor | None],
    in_eps: float,
    epilogue: list[Tensor | None],
    eps: float,
    residual: Tensor | None,
    relu: bool,
    stride: list[int],
    padding: list[int],
    part_mean: Tensor | None = None,
    part_m2: Tensor | None = None,
) -> None:
    """With tensors input, weight and output: by "tma", or by "triton"."""
    outside = (*tensors, prologue, in_eps, epilogue, eps, residual, relu)
    with torch.cuda.device_of(tensors[0]):
        if choice.startswith("tma"):
            launch_conv_1x1(*outside, tile, part_mean, part_m2)
        else:
            _launch_conv(*outside, stride, padding, tile, part_mean, part_m2)


def _tile_of(choice: str, input: Tensor) -> ConvTile:
    make = tile_of_8_warps if _is_stem(input) else conv_tile
    return make(choice.partition(":")[2], target_of(input.device))


def _is_stem(input: Tensor) -> bool:
    # Sixteens of channels are aligned; the images' three are not, and fill no tile's depth.
    return input.shape[1] % 16 != 0


def _launch_conv(
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    prologue: list[Tensor | None],
    in_eps: float,
    epilogue: list[Tensor | None],
    eps: float,
    residual: Tensor | None,
    relu: bool,
    stride: list[int],
    padding: list[int],
    tile: ConvTile,
    part_mean: Tensor | None,
    part_m2: Tensor | None,
) -> None:
    rows, out_channels = rows_of(output), output.shape[1]
    in_channels = input.shape[1]
    lines = _is_stem(input)
    tap_channels = in_channels * weight.shape[3] if lines else in_channels
    block_depth = tile.block_depth(input.dtype)
    if lines:
        # In float32 a depth of 16 spills registers.
        block_depth = min(block_depth, max(32, triton.next_power_of_2(tap_channels)))
    programs = triton.cdiv(rows, tile.block_rows) * triton.cdiv(out_channels, tile.block_columns)
    conv_fwd_kernel[(programs,)](
        input,
        weight,
        output,
        *prologue,
        *epilogue,
        residual,
        part_mean,
        part_m2,
        rows,
        input.shape[2],
        input.shape[3],
        in_channels,
        output.shape[2],
        output.shape[3],
        out_channels,
        KERNEL_H=weight.shape[2],
        KERNEL_W=weight.shape[3],
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        PADDING_H=padding[0],
        PADDING_W=padding[1],
        IN_EPS=in_eps,
        EPS=eps,
        RELU=relu,
        LINES=lines,
        EVEN_DEPTH=tap_channels % block_depth == 0,
        WIDE=is_wide(input) or is_wide(output),
        BLOCK_ROWS=tile.block_rows,
        BLOCK_COLUMNS=tile.block_columns,
        BLOCK_DEPTH=block_depth,
        GROUP_ROWS=GROUP_ROWS,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )


def conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
    packed: Tensor | None,
    choice: str | None = None,
) -> Tensor:
    """relu?(bn(conv(input, weight) + bias) [+ residual]) with BatchNorm's running statistics.

    input is ``(N, Ci, H, W)``, weight ``(Co, Ci / groups, kh, kw)``, residual like the result, the
    vectors ``(Co,)``; packed is the CPU's and is ignored; choice is one of choice.candidates, None
    for choose_conv's. Returns ``(N, Co, OH, OW)``,
    channels_last. Raises RuntimeError where shapes, dtypes or devices do not fit.
    """
    op = "conv_bn_relu"
    shape = _output_shape(op, input, weight, stride, padding, dilation, groups)
    epilogue = vectors(
        op,
        input,
        shape[1],
        running_mean=running_mean,
        running_var=running_var,
        bias=bias,
        bn_weight=bn_weight,
        bn_bias=bn_bias,
    )
    geometry = (stride, padding, dilation, groups)
    if choice is None:
        name = "conv_bn" + "_add" * (residual is not None) + "_relu" * relu
        choice = choose_conv(input, weight, *geometry, name)
    if choice in CUDNN_FUSED.values():
        return _cudnn_fused(input, weight, epilogue, eps, residual, *geometry)
    if choice == "cudnn":
        z = _aten_convolution(input, weight, stride, padding, dilation, groups)
        mean = running_mean if bias is None else running_mean - bias
        affine = (mean, running_var, bn_weight, bn_bias, eps)
        return bn_add_relu(z, *affine, residual, None, None, None, None, 0.0, relu)
    input, weight = channels_last(input), channels_last(weight)
    output = empty_channels_last(input, shape)
    require_like(op, "residual", residual, "the output", output)
    _launch(
        choice,
        _tile_of(choice, input),
        (input, weight, output),
        [None] * 4,
        0.0,
        epilogue,
        eps,
        channels_last(residual),
        relu,
        stride,
        padding,
    )
    return output


def conv_stats(
    input: Tensor,
    weight: Tensor,
    in_mean: Tensor | None,
    in_var: Tensor | None,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    in_eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    choice: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """z = conv(relu(bn(input)), weight), and z's mean and biased variance over N, H, W.

    Without in_mean the input is convolved as it is. input is ``(N, Ci, H, W)``, weight
    ``(Co, Ci / groups, kh, kw)``, the vectors ``(Ci,)``; choice as for conv_bn_relu. Returns z
    ``(N, Co, OH, OW)`` channels_last, mean and variance ``(Co,)``. Raises RuntimeError where
    shapes do not fit.
    """
    op = "conv_stats"
    require((in_mean is None) == (in_var is None), op, "in_mean and in_var must be given together")
    shape = _output_shape(op, input, weight, stride, padding, dilation, groups)
    prologue = vectors(
        op,
        input,
        input.shape[1],
        in_mean=in_mean,
        in_var=in_var,
        in_weight=in_weight,
        in_bias=in_bias,
    )
    if choice is None:
        name = "conv_stats" if in_mean is None else "bn_conv_stats"
        choice = choose_conv(input, weight, stride, padding, dilation, groups, name)
    if choice == "cudnn":
        if in_mean is not None:
            none = (None,) * 5
            input = bn_add_relu(input, *prologue, in_eps, *none, 0.0, True)
        z = _aten_convolution(input, weight, stride, padding, dilation, groups)
        return (channels_last(z), *channel_stats(z))
    input, weight = channels_last(input), channels_last(weight)
    output = empty_channels_last(input, shape)
    rows = rows_of(output)
    tile = _tile_of(choice, input)
    part_mean = torch.empty(
        (triton.cdiv(rows, tile.block_rows), shape[1]),
        dtype=parameter_dtype(input.dtype),
        device=input.device,
    )
    part_m2 = torch.empty_like(part_mean)
    _launch(
        choice,
        tile,
        (input, weight, output),
        prologue,
        in_eps,
        [None] * 5,
        0.0,
        None,
        False,
        stride,
        padding,
        part_mean,
        part_m2,
    )
    with torch.cuda.device_of(input):
        mean, var = merge_stats(part_mean, part_m2, rows, tile.block_rows)
    return output, mean, var

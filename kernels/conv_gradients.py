"""The two products of a convolution's gradient: implicit GEMMs on channels_last tensors.

Data gradient: rows are the input's pixels, columns Ci, the depth kh*kw*Co; its epilogue masks with
the ReLU of the layer before and sums what that layer's BatchNorm needs. Weight gradient: rows are
Co, columns Ci of one tap, the depth N*OH*OW, split among programs whose sums are added in a fixed
order; its prologue applies the layer before to the input. Either can apply the gradient of the
statistics to dz as it is loaded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._conv_parts import GROUP_ROWS, grouped_tile, split_columns
from ._launch import (
    MAX_PARTIALS,
    empty_channels_last,
    is_wide,
    rows_of,
)
from ._tiles import ConvTile
from .bn_add_relu import channel_scale, reduce_gradients
from .choice import multiprocessors

SUM_BLOCK_PARTS = 32
SUM_BLOCK = 64
# The fewest steps of the depth that are worth a program and a share of the workspace.
SPLIT_STEPS = 4


@triton.jit
def statistics_gradient(dz, z, center, constant, slope):
    """dz and what the gradients of mean and variance add to it, in float32."""
    return (z.to(tl.float32) - center) * slope + constant + dz.to(tl.float32)


@triton.jit
def statistics_vectors(mean, dmean, dvar, c, c_mask, share):
    """center, constant and slope of statistics_gradient; share is one over the pixels."""
    center = tl.load(mean + c, mask=c_mask, other=0.0).to(tl.float32)
    constant = tl.load(dmean + c, mask=c_mask, other=0.0).to(tl.float32) * share
    slope = tl.load(dvar + c, mask=c_mask, other=0.0).to(tl.float32) * (2.0 * share)
    return center, constant, slope


@triton.jit
def conv_dgrad_epilogue(
    acc,
    pixel,
    row_mask,
    part,
    first_column,
    dinput,
    input,
    in_mean,
    in_var,
    in_weight,
    in_bias,
    part_g,
    part_gz,
    in_channels,
    IN_EPS: tl.constexpr,
):
    column = first_column + tl.arange(0, acc.shape[1])
    column_mask = column < in_channels
    mask = row_mask[:, None] & column_mask[None, :]
    offset = pixel[:, None] * in_channels + column[None, :]
    if input is not None:
        center = tl.load(in_mean + column, mask=column_mask, other=0.0).to(tl.float32)
        scale = channel_scale(in_var, in_weight, column, column_mask, IN_EPS, tl.float32)
        deviation = tl.load(input + offset, mask=mask, other=0.0).to(tl.float32) - center[None, :]
        activation = deviation * scale[None, :]
        if in_bias is not None:
            shift = tl.load(in_bias + column, mask=column_mask, other=0.0).to(tl.float32)
            activation += shift[None, :]
        # Rows past the end are zero in acc, and stay it.
        acc = tl.where(activation <= 0, 0.0, acc)
        at = part * in_channels + column
        tl.store(part_g + at, tl.sum(acc, axis=0), mask=column_mask)
        tl.store(part_gz + at, tl.sum(acc * deviation, axis=0), mask=column_mask)
        acc *= scale[None, :]
    tl.store(dinput + offset, acc.to(dinput.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["rows", "phase_rows", "height", "width", "out_height", "out_width"],
)
def conv_dgrad_kernel(
    dz,  # (N, OH, OW, Co)
    z,  # (N, OH, OW, Co) dtype of dz, or None: dz has the statistics' gradient in it
    mean,  # (Co,) of z, or None with z
    dmean,  # (Co,) or None with z
    dvar,  # (Co,) or None with z
    weight,  # (Co, KH, KW, Ci) dtype of dz
    dinput,  # (N, H, W, Ci) dtype of dz
    input,  # (N, H, W, Ci) dtype of dz, whose BatchNorm and ReLU come before, or None
    in_mean,  # (Ci,) or None with input
    in_var,  # (Ci,) or None with input
    in_weight,  # (Ci,) or None for 1
    in_bias,  # (Ci,) or None for 0
    part_g,  # (phases * ceil(phase_rows / BLOCK_ROWS), Ci) float32: sum of g, or None with input
    part_gz,  # the same: sum of g * (input - in_mean), or None with input
    rows,  # N * OH * OW
    phase_rows,  # N * ceil(H / STRIDE_H) * ceil(W / STRIDE_W)
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
    EVEN_DEPTH: tl.constexpr,  # Co is a multiple of BLOCK_DEPTH
    WIDE: tl.constexpr,  # offsets need 64 bits
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    row_blocks = tl.cdiv(phase_rows, BLOCK_ROWS)
    row_block, column_block = grouped_tile(
        tl.program_id(0), row_blocks, tl.cdiv(in_channels, BLOCK_COLUMNS), GROUP_ROWS
    )

    # Pixels whose row and column leave the same remainders by the stride meet the same taps: a
    # phase. Of the kernel, KERNEL_H taps from first_h in steps of STRIDE_H are theirs.
    phase_h = 0
    phase_w = 0
    if STRIDE_H > 1:
        phase_h = tl.program_id(1) // STRIDE_W
    if STRIDE_W > 1:
        phase_w = tl.program_id(1) % STRIDE_W
    first_h = (phase_h + PADDING_H) % STRIDE_H
    first_w = (phase_w + PADDING_W) % STRIDE_W
    taps_w = (KERNEL_W - first_w + STRIDE_W - 1) // STRIDE_W
    taps = (KERNEL_H - first_h + STRIDE_H - 1) // STRIDE_H * taps_w

    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_mask = column < in_channels
    phase_width = tl.cdiv(width, STRIDE_W)
    phase_height = tl.cdiv(height, STRIDE_H)
    y = (row // phase_width) % phase_height
    x = row % phase_width
    image = row // (phase_width * phase_height)
    row_mask = row < phase_rows
    row_mask = row_mask & (y * STRIDE_H + phase_h < height) & (x * STRIDE_W + phase_w < width)
    if WIDE:
        image = image.to(tl.int64)
    pixel = (image * height + y * STRIDE_H + phase_h) * width + x * STRIDE_W + phase_w
    top = y + (phase_h + PADDING_H) // STRIDE_H
    left = x + (phase_w + PADDING_W) // STRIDE_W
    base = ((image * out_height + top) * out_width + left) * out_channels

    if z is not None:
        share = 1.0 / rows.to(tl.float32)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for step in range(0, taps * tl.cdiv(out_channels, BLOCK_DEPTH)):
        # Without taps the loop is empty, but what is loaded ahead divides all the same.
        tap = step % tl.maximum(taps, 1)
        tap_h = tap // tl.maximum(taps_w, 1)
        tap_w = tap % tl.maximum(taps_w, 1)
        c = step // tl.maximum(taps, 1) * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
        a_mask = row_mask
        if KERNEL_H > 1 or STRIDE_H > 1 or PADDING_H > 0:
            a_mask = a_mask & (top >= tap_h) & (top - tap_h < out_height)
        if KERNEL_W > 1 or STRIDE_W > 1 or PADDING_W > 0:
            a_mask = a_mask & (left >= tap_w) & (left - tap_w < out_width)
        a_mask = a_mask[:, None]
        b_mask = column_mask[None, :]
        if not EVEN_DEPTH:
            a_mask = a_mask & (c < out_channels)[None, :]
            b_mask = b_mask & (c < out_channels)[:, None]
        a_offset = base[:, None] + (c - (tap_h * out_width + tap_w) * out_channels)[None, :]
        a = tl.load(dz + a_offset, mask=a_mask, other=0.0)
        if z is not None:
            value = tl.load(z + a_offset, mask=a_mask, other=0.0)
            vectors = statistics_vectors(mean, dmean, dvar, c, c < out_channels, share)
            value = statistics_gradient(
                a, value, vectors[0][None, :], vectors[1][None, :], vectors[2][None, :]
            )
            # Outside the image there is no gradient.
            a = tl.where(a_mask, value, 0.0).to(dz.dtype.element_ty)
        kernel_tap = (first_h + tap_h * STRIDE_H) * KERNEL_W + first_w + tap_w * STRIDE_W
        depth = c * (KERNEL_H * KERNEL_W) + kernel_tap
        b_offset = depth[:, None] * in_channels + column[None, :]
        b = tl.load(weight + b_offset, mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="tf32")

    # In slices, as in conv_epilogue.
    slices = (acc,)
    if BLOCK_COLUMNS >= 128:
        slices = split_columns(slices[0])
    for i in tl.static_range(len(slices)):
        conv_dgrad_epilogue(
            slices[i],
            pixel,
            row_mask,
            tl.program_id(1) * row_blocks + row_block,
            column_block * BLOCK_COLUMNS + i * (BLOCK_COLUMNS // len(slices)),
            dinput,
            input,
            in_mean,
            in_var,
            in_weight,
            in_bias,
            part_g,
            part_gz,
            in_channels,
            IN_EPS,
        )


@triton.jit(
    do_not_specialize=["rows", "split_rows", "height", "width", "out_height", "out_width"],
)
def conv_wgrad_kernel(
    dz,  # (N, OH, OW, Co)
    z,  # (N, OH, OW, Co) dtype of dz, or None: dz has the statistics' gradient in it
    mean,  # (Co,) of z, or None with z
    dmean,  # (Co,) or None with z
    dvar,  # (Co,) or None with z
    input,  # (N, H, W, Ci) dtype of dz
    in_mean,  # (Ci,) of the prologue, or None for no prologue
    in_var,  # (Ci,) or None
    in_weight,  # (Ci,) or None for 1
    in_bias,  # (Ci,) or None for 0
    dweight,  # (splits, Co, KH, KW, Ci): a sum for each split
    rows,  # N * OH * OW
    split_rows,  # rows that one split sums, a multiple of BLOCK_DEPTH
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
    WIDE: tl.constexpr,  # offsets need 64 bits
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    # Taps run fastest: the programs of one split read the same pixels at about the same time.
    taps: tl.constexpr = KERNEL_H * KERNEL_W
    column_blocks = tl.cdiv(in_channels, BLOCK_COLUMNS)
    tap = tl.program_id(0) % taps
    column_block = tl.program_id(0) // taps % column_blocks
    row_block = tl.program_id(0) // (taps * column_blocks)
    split = tl.program_id(1)
    tap_h = tap // KERNEL_W
    tap_w = tap % KERNEL_W

    co = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ci = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    co_mask = co < out_channels
    ci_mask = ci < in_channels
    if z is not None:
        share = 1.0 / rows.to(tl.float32)
        vectors = statistics_vectors(mean, dmean, dvar, co, co_mask, share)
    if in_mean is not None:
        center = tl.load(in_mean + ci, mask=ci_mask, other=0.0).to(tl.float32)
        scale = channel_scale(in_var, in_weight, ci, ci_mask, IN_EPS, tl.float32)
        shift = tl.zeros((BLOCK_COLUMNS,), dtype=tl.float32)
        if in_bias is not None:
            shift = tl.load(in_bias + ci, mask=ci_mask, other=0.0).to(tl.float32)

    first = split * split_rows
    last = tl.minimum(first + split_rows, rows)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for start in range(first, last, BLOCK_DEPTH):
        row = start + tl.arange(0, BLOCK_DEPTH)
        row_mask = row < last
        out_pixel = row
        if WIDE:
            out_pixel = row.to(tl.int64)
        a_mask = row_mask[:, None] & co_mask[None, :]
        a_offset = out_pixel[:, None] * out_channels + co[None, :]
        a = tl.load(dz + a_offset, mask=a_mask, other=0.0)
        if z is not None:
            value = tl.load(z + a_offset, mask=a_mask, other=0.0)
            value = statistics_gradient(
                a, value, vectors[0][None, :], vectors[1][None, :], vectors[2][None, :]
            )
            a = tl.where(a_mask, value, 0.0).to(dz.dtype.element_ty)

        pixel = out_pixel
        b_mask = row_mask
        if taps > 1 or STRIDE_H > 1 or STRIDE_W > 1 or PADDING_H > 0 or PADDING_W > 0:
            y = (row // out_width) % out_height * STRIDE_H - PADDING_H + tap_h
            x = row % out_width * STRIDE_W - PADDING_W + tap_w
            image = row // (out_width * out_height)
            if WIDE:
                image = image.to(tl.int64)
            pixel = (image * height + y) * width + x
            if PADDING_H > 0:
                b_mask = b_mask & (y >= 0) & (y < height)
            if PADDING_W > 0:
                b_mask = b_mask & (x >= 0) & (x < width)
        b_mask = b_mask[:, None] & ci_mask[None, :]
        b_offset = pixel[:, None] * in_channels + ci[None, :]
        b = tl.load(input + b_offset, mask=b_mask, other=0.0)
        if in_mean is not None:
            value = (b.to(tl.float32) - center[None, :]) * scale[None, :] + shift[None, :]
            # A padded zero is a zero of the activation, not of its input.
            b = tl.where(b_mask, tl.where(value < 0, 0.0, value), 0.0).to(input.dtype.element_ty)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="tf32")

    offset = (co[:, None] * taps + tap) * in_channels + ci[None, :]
    start = split.to(tl.int64) * (out_channels * taps * in_channels)
    value = acc.to(dweight.dtype.element_ty)
    tl.store(dweight + start + offset, value, mask=co_mask[:, None] & ci_mask[None, :])


@triton.jit
def sum_parts_kernel(
    part,  # (parts, numel) float32
    output,  # (ceil(parts / group), numel)
    parts,
    numel,
    group,  # parts that one program adds
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(numel, BLOCK)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    row_out = tl.program_id(0) // blocks
    first = row_out * group
    last = tl.minimum(first + group, parts)
    total = tl.zeros((BLOCK_PARTS, BLOCK), dtype=tl.float32)
    for start in range(first, last, BLOCK_PARTS):
        row = start + tl.arange(0, BLOCK_PARTS)
        offset = row[:, None].to(tl.int64) * numel + at[None, :]
        total += tl.load(part + offset, mask=(row < last)[:, None] & mask[None, :], other=0.0)
    offset = row_out.to(tl.int64) * numel + at
    tl.store(output + offset, tl.sum(total, axis=0).to(output.dtype.element_ty), mask=mask)


def sum_parts(part: Tensor, output: Tensor, group: int) -> Tensor:
    """Each `group` rows of ``(parts, numel)`` added into a row of ``(ceil(parts/group), numel)``.

    In a fixed order. Both are dense; ``numel`` is what is left of the shapes. Returns output.
    """
    parts, numel = part.shape[0], part[0].numel()
    # One axis: the others of a grid end at 65,535.
    sum_parts_kernel[(triton.cdiv(numel, SUM_BLOCK) * triton.cdiv(parts, group),)](
        part,
        output,
        parts,
        numel,
        group,
        BLOCK_PARTS=SUM_BLOCK_PARTS,
        BLOCK=SUM_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return output


def _few_parts(part: Tensor) -> Tensor:
    """``(parts, C)`` in sums of neighbours, so that no program has more than MAX_PARTIALS."""
    while part.shape[0] > MAX_PARTIALS:
        group = 2 * SUM_BLOCK_PARTS
        fewer = part.new_empty((triton.cdiv(part.shape[0], group), part.shape[1]))
        part = sum_parts(part, fewer, group)
    return part


def _geometry(weight: Tensor, stride: list[int], padding: list[int]) -> dict[str, int]:
    values = (*weight.shape[2:], *stride, *padding)
    names = ("KERNEL_H", "KERNEL_W", "STRIDE_H", "STRIDE_W", "PADDING_H", "PADDING_W")
    return dict(zip(names, values, strict=True))


def data_gradient(
    dz: Tensor,
    statistics: list[Tensor | None],
    input: Tensor,
    weight: Tensor,
    prologue: list[Tensor | None],
    in_eps: float,
    stride: list[int],
    padding: list[int],
    tile: ConvTile,
) -> list[Tensor]:
    """The gradient of a convolution's input, and through relu(bn(input)) where there is a prologue.

    dz is ``(N, Co, OH, OW)``, the gradient of the convolution's result; or, with statistics z,
    mean, dmean and dvar (else four None), what is to be added to theirs. input is
    ``(N, Ci, H, W)``, weight ``(Co, Ci, kh, kw)``, prologue in_mean, in_var, in_weight and in_bias
    ``(Ci,)`` or None; all channels_last. Returns dinput, and with a prologue the gradients of its
    four vectors, empty for those that are None.
    """
    in_mean, in_var, in_weight, in_bias = prologue
    n, in_channels, height, width = input.shape
    out_channels = dz.shape[1]
    phases = stride[0] * stride[1]
    phase_rows = n * triton.cdiv(height, stride[0]) * triton.cdiv(width, stride[1])
    row_blocks = triton.cdiv(phase_rows, tile.block_rows)
    programs = row_blocks * triton.cdiv(in_channels, tile.block_columns)
    block_depth = tile.block_depth(dz.dtype)
    dinput = empty_channels_last(input, input.shape)
    part_g = part_gz = None
    if in_mean is not None:
        shape = (phases * row_blocks, in_channels)
        part_g, part_gz = (
            torch.empty(shape, dtype=torch.float32, device=input.device) for _ in range(2)
        )
    with torch.cuda.device_of(dz):
        conv_dgrad_kernel[(programs, phases)](
            dz,
            *statistics,
            weight,
            dinput,
            None if in_mean is None else input,
            *prologue,
            part_g,
            part_gz,
            rows_of(dz),
            phase_rows,
            height,
            width,
            in_channels,
            *dz.shape[2:],
            out_channels,
            **_geometry(weight, stride, padding),
            IN_EPS=in_eps,
            EVEN_DEPTH=out_channels % block_depth == 0,
            WIDE=is_wide(dz) or is_wide(input),
            BLOCK_ROWS=tile.block_rows,
            BLOCK_COLUMNS=tile.block_columns,
            BLOCK_DEPTH=block_depth,
            GROUP_ROWS=GROUP_ROWS,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
        if part_g is None or part_gz is None:
            return [dinput]
        parts = _few_parts(part_g), _few_parts(part_gz)
        vectors = reduce_gradients(*parts, in_var, in_weight, in_eps)
    if in_bias is None:
        vectors[3] = vectors[3].new_empty(0)
    return [dinput, *vectors]


def weight_splits(tiles: int, steps: int, enough: int) -> int:
    """Among how many programs the depth of `steps` blocks is split, where there are `tiles`.

    Two programs for each of `enough` multiprocessors, each with SPLIT_STEPS blocks or more.
    """
    return max(1, min(triton.cdiv(2 * enough, tiles), steps // SPLIT_STEPS))


def weight_gradient(
    dz: Tensor,
    statistics: list[Tensor | None],
    input: Tensor,
    weight: Tensor,
    prologue: list[Tensor | None],
    in_eps: float,
    stride: list[int],
    padding: list[int],
    tile: ConvTile,
) -> Tensor:
    """The gradient of a convolution's weight: arguments as for data_gradient.

    With a prologue the convolution's input is relu(bn(input)). Returns ``(Co, Ci, kh, kw)``,
    channels_last. The sums of the splits are kept in float32.
    """
    rows = rows_of(dz)
    in_channels, out_channels = input.shape[1], dz.shape[1]
    wide = is_wide(dz) or is_wide(input)
    block_depth = tile.block_depth_of_pixels(dz.dtype, wide)
    tiles = triton.cdiv(out_channels, tile.block_rows) * weight[0, 0].numel()
    tiles *= triton.cdiv(in_channels, tile.block_columns)
    steps = triton.cdiv(rows, block_depth)
    split_steps = triton.cdiv(steps, weight_splits(tiles, steps, multiprocessors(dz.device)))
    splits = triton.cdiv(steps, split_steps)
    dweight = empty_channels_last(weight, weight.shape)
    sums = dweight
    if splits > 1:
        shape = (splits, weight.numel())
        sums = torch.empty(shape, dtype=torch.float32, device=weight.device)
    with torch.cuda.device_of(dz):
        conv_wgrad_kernel[(tiles, splits)](
            dz,
            *statistics,
            input,
            *prologue,
            sums,
            rows,
            split_steps * block_depth,
            *input.shape[2:],
            in_channels,
            *dz.shape[2:],
            out_channels,
            **_geometry(weight, stride, padding),
            IN_EPS=in_eps,
            WIDE=wide,
            BLOCK_ROWS=tile.block_rows,
            BLOCK_COLUMNS=tile.block_columns,
            BLOCK_DEPTH=block_depth,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
        return dweight if splits == 1 else sum_parts(sums, dweight, splits)

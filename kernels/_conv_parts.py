"""What the convolutions' kernels share: the order of tiles, the prologue, the epilogue."""

import triton
import triton.language as tl

from .bn_add_relu import channel_scale

GROUP_ROWS = 8


@triton.jit
def grouped_tile(tile, row_blocks, column_blocks, GROUP_ROWS: tl.constexpr):
    """Which rows and columns: neighbouring tiles share both, in L2."""
    group_tiles = GROUP_ROWS * column_blocks
    group = tile // group_tiles
    group_rows = tl.minimum(row_blocks - group * GROUP_ROWS, GROUP_ROWS)
    inside = tile % group_tiles
    return group * GROUP_ROWS + inside % group_rows, inside // group_rows


@triton.jit
def activation_before(
    a, mask, c, in_channels, in_mean, in_var, in_weight, in_bias, IN_EPS: tl.constexpr
):
    """relu(bn(a)) where the mask is, else 0: a padded zero is one of the activation."""
    c_mask = c < in_channels
    scale = channel_scale(in_var, in_weight, c, c_mask, IN_EPS, tl.float32)
    shift = tl.load(in_mean + c, mask=c_mask, other=0.0).to(tl.float32)
    value = (a.to(tl.float32) - shift[None, :]) * scale[None, :]
    if in_bias is not None:
        value += tl.load(in_bias + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]
    return tl.where(mask, tl.where(value < 0, 0.0, value), 0.0).to(a.dtype)


@triton.jit
def split_columns(acc):
    halves = tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2))
    low, high = tl.split(tl.permute(halves, (0, 2, 1)))
    return low, high


@triton.jit
def conv_epilogue_slice(
    acc,
    row_block,
    first_column,
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
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
):
    BLOCK_ROWS: tl.constexpr = acc.shape[0]
    SLICE: tl.constexpr = acc.shape[1]
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, SLICE)
    row_mask = row < rows
    column_mask = column < out_channels
    mask = row_mask[:, None] & column_mask[None, :]
    if WIDE:
        row = row.to(tl.int64)
    offset = row[:, None] * out_channels + column[None, :]
    if running_mean is not None:
        scale = channel_scale(running_var, bn_weight, column, column_mask, EPS, tl.float32)
        shift = -tl.load(running_mean + column, mask=column_mask, other=0.0).to(tl.float32)
        if bias is not None:
            shift += tl.load(bias + column, mask=column_mask, other=0.0).to(tl.float32)
        acc = (acc + shift[None, :]) * scale[None, :]
        if bn_bias is not None:
            acc += tl.load(bn_bias + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            acc += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            acc = tl.where(acc < 0, 0.0, acc)
    tl.store(output + offset, acc.to(output.dtype.element_ty), mask=mask)
    if part_mean is not None:
        # Rows past the end are zero in acc: they add nothing to the sum.
        count = tl.minimum(rows - row_block * BLOCK_ROWS, BLOCK_ROWS).to(tl.float32)
        mean = tl.sum(acc, axis=0) / count
        deviation = tl.where(row_mask[:, None], acc - mean[None, :], 0.0)
        m2 = tl.sum(deviation * deviation, axis=0)
        part = row_block * out_channels + column
        tl.store(part_mean + part, mean, mask=column_mask)
        tl.store(part_m2 + part, m2, mask=column_mask)


@triton.jit
def conv_epilogue(
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
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
):
    # In slices: a whole tile of accumulators, residuals and addresses does not fit the registers.
    BLOCK_COLUMNS: tl.constexpr = acc.shape[1]
    slices = (acc,)
    if BLOCK_COLUMNS >= 128 or (WIDE and BLOCK_COLUMNS >= 64):
        slices = split_columns(slices[0])
    if BLOCK_COLUMNS >= 256:
        slices = split_columns(slices[0]) + split_columns(slices[1])
    for i in tl.static_range(len(slices)):
        conv_epilogue_slice(
            slices[i],
            row_block,
            column_block * BLOCK_COLUMNS + i * (BLOCK_COLUMNS // len(slices)),
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

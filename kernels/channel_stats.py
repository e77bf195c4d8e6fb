"""Per-channel mean and biased variance of a channels_last tensor, without cancellation.

Partial results are (count, mean, M2), M2 the sum of squared deviations from the partial mean, and
are merged in a fixed order: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm
for Computing Sample Variances" (1979), eq. 2.1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    MAX_PARTIALS,
    accumulator,
    channels_last,
    is_wide,
    parameter_dtype,
    row_tile,
    rows_of,
)

MERGE_BLOCK_TILES = 64
MERGE_BLOCK_CHANNELS = 16


@triton.jit
def channel_stats_fwd_kernel(
    z,  # (rows, channels)
    part_mean,  # (ceil(rows / part_rows), channels) ACC
    part_m2,  # (ceil(rows / part_rows), channels) ACC
    rows,
    channels,
    part_rows,  # rows that one program reads
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    part = tl.program_id(0) // channel_blocks
    c = (tl.program_id(0) % channel_blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    c_mask = c < channels
    lane = tl.arange(0, BLOCK_ROWS)
    first = part * part_rows
    last = tl.minimum(first + part_rows, rows)

    # Welford's update in every lane; the lanes are merged at the end.
    count = tl.zeros((BLOCK_ROWS,), dtype=ACC)
    mean = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=ACC)
    m2 = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=ACC)
    for start in range(first, last, BLOCK_ROWS):
        row = start + lane
        r_mask = row < last
        mask = r_mask[:, None] & c_mask[None, :]
        offset = row.to(tl.int64)[:, None] if WIDE else row[:, None]
        value = tl.load(z + offset * channels + c[None, :], mask=mask, other=0.0).to(ACC)
        count += r_mask.to(ACC)
        deviation = tl.where(mask, value - mean, 0.0)
        mean += deviation / tl.maximum(count, 1.0)[:, None]
        m2 += tl.where(mask, deviation * (value - mean), 0.0)

    total = tl.sum(count, axis=0)
    weight = count / tl.maximum(total, 1.0)
    # The plain average, then its rounding error from the small differences that are left.
    anchor = tl.sum(mean * weight[:, None], axis=0)
    spread = tl.where(count[:, None] > 0, mean - anchor[None, :], 0.0)
    shift = tl.sum(spread * weight[:, None], axis=0)
    spread -= shift[None, :]
    merged = tl.sum(m2 + count[:, None] * spread * spread, axis=0)
    tl.store(part_mean + part * channels + c, anchor + shift, mask=c_mask)
    tl.store(part_m2 + part * channels + c, merged, mask=c_mask)


@triton.jit
def channel_stats_merge_kernel(
    part_mean,  # (tiles, channels) ACC
    part_m2,  # (tiles, channels) ACC
    out_mean,  # (ceil(tiles / group), channels) ACC
    out_m2,  # (ceil(tiles / group), channels) ACC: M2, or the biased variance where FINAL
    rows,  # rows of the whole tensor
    tiles,
    channels,
    tile_rows,  # rows that one tile covers; the last one may be short
    group,  # tiles that one program merges
    ACC: tl.constexpr,
    FINAL: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    pid = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    c_mask = c < channels
    first = pid * group
    last = tl.minimum(first + group, tiles)

    mean = tl.zeros((BLOCK_CHANNELS,), dtype=ACC)
    m2 = tl.zeros((BLOCK_CHANNELS,), dtype=ACC)
    for start in range(first, last, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        mask = (tile < last)[:, None] & c_mask[None, :]
        offset = tile[:, None].to(tl.int64) * channels + c[None, :]
        tile_mean = tl.load(part_mean + offset, mask=mask, other=0.0)
        tile_m2 = tl.load(part_m2 + offset, mask=mask, other=0.0)
        count = tl.minimum(rows - tile * tile_rows, tile_rows)
        count = tl.where(tile < last, count, 0).to(ACC)
        block = tl.sum(count, axis=0)
        if start == first:
            mean = tl.sum(tile_mean * (count / block)[:, None], axis=0)
        deviation = tl.where(mask, tile_mean - mean[None, :], 0.0)
        shift = tl.sum(deviation * count[:, None], axis=0) / block
        deviation -= shift[None, :]
        block_m2 = tl.sum(tile_m2 + count[:, None] * deviation * deviation, axis=0)
        before = ((start - first) * tile_rows).to(ACC)
        m2 += block_m2 + shift * shift * (before * block / (before + block))
        mean += shift * (block / (before + block))
    if FINAL:
        m2 /= tl.maximum(rows, 1).to(ACC)
    offset = pid.to(tl.int64) * channels + c
    tl.store(out_mean + offset, mean, mask=c_mask)
    tl.store(out_m2 + offset, m2, mask=c_mask)


def merge_stats(
    part_mean: Tensor, part_m2: Tensor, rows: int, tile_rows: int
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(C,)`` from partial means and M2 ``(tiles, C)`` in row order."""
    tiles, channels = part_mean.shape
    while True:
        # One level reads at most MAX_PARTIALS tiles a program, so that no program is a bottleneck.
        group = tiles if tiles <= MAX_PARTIALS else MERGE_BLOCK_TILES
        groups = triton.cdiv(tiles, group) if tiles else 1
        final = groups == 1
        shape = (channels,) if final else (groups, channels)
        out_mean, out_m2 = part_mean.new_empty(shape), part_mean.new_empty(shape)
        channel_stats_merge_kernel[(groups, triton.cdiv(channels, MERGE_BLOCK_CHANNELS))](
            part_mean,
            part_m2,
            out_mean,
            out_m2,
            rows,
            tiles,
            channels,
            tile_rows,
            group,
            ACC=accumulator(part_mean.dtype),
            FINAL=final,
            BLOCK_TILES=MERGE_BLOCK_TILES,
            BLOCK_CHANNELS=MERGE_BLOCK_CHANNELS,
            num_warps=4,
            enable_fp_fusion=True,
        )
        if final:
            return out_mean, out_m2
        part_mean, part_m2, tiles, tile_rows = out_mean, out_m2, groups, tile_rows * group


def channel_stats(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(C,)`` of ``(N, C, H, W)`` over N, H, W, in one read of z."""
    z = channels_last(z)
    rows, channels = rows_of(z), z.shape[1]
    tile = row_tile(channels, 2048)
    part_rows = tile.block_rows * max(1, triton.cdiv(rows, tile.block_rows * MAX_PARTIALS))
    parts = triton.cdiv(rows, part_rows)
    dtype = parameter_dtype(z.dtype)
    part_mean = torch.empty((parts, channels), dtype=dtype, device=z.device)
    part_m2 = torch.empty_like(part_mean)
    with torch.cuda.device_of(z):
        if parts:
            channel_stats_fwd_kernel[(parts * triton.cdiv(channels, tile.block_channels),)](
                z,
                part_mean,
                part_m2,
                rows,
                channels,
                part_rows,
                ACC=accumulator(z.dtype),
                WIDE=is_wide(z),
                BLOCK_ROWS=tile.block_rows,
                BLOCK_CHANNELS=tile.block_channels,
                num_warps=4,
                enable_fp_fusion=True,
            )
        return merge_stats(part_mean, part_m2, rows, part_rows)

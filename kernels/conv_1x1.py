"""1x1 convolutions for chips that have a tensor memory accelerator (TMA): sm_90 and later.

The GEMM of conv_fwd_kernel with the same prologue and epilogue, but both operands come by TMA, and
the grid is persistent: a program for each place on the chip takes tile after tile, so that the
loads of the next tile begin while the last one's epilogue is written. The descriptors are made by
the launcher and travel as kernel arguments: a CUDA graph captures them, and nothing is allocated.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._conv_parts import GROUP_ROWS, activation_before, conv_epilogue, grouped_tile
from ._launch import is_wide, rows_of
from ._tiles import ConvTile
from .choice import multiprocessors


@triton.jit(do_not_specialize=["rows"])
def conv_1x1_fwd_kernel(
    input,  # descriptor of (rows, Ci), in blocks of BLOCK_ROWS x BLOCK_DEPTH
    weight,  # descriptor of (Co, Ci) of input's dtype, in blocks of BLOCK_COLUMNS x BLOCK_DEPTH
    output,  # (rows, Co) dtype of input
    in_mean,  # (Ci,) of the prologue, or None for no prologue
    in_var,  # (Ci,) or None
    in_weight,  # (Ci,) or None for 1
    in_bias,  # (Ci,) or None for 0
    running_mean,  # (Co,) of the inference epilogue, or None in training
    running_var,  # (Co,) or None
    bias,  # (Co,) of the convolution, or None for 0
    bn_weight,  # (Co,) or None for 1
    bn_bias,  # (Co,) or None for 0
    residual,  # (rows, Co) dtype of input, or None
    part_mean,  # (ceil(rows / BLOCK_ROWS), Co) float32 of the training epilogue, or None
    part_m2,  # (ceil(rows / BLOCK_ROWS), Co) float32, or None
    rows,  # N * H * W
    in_channels,
    out_channels,
    IN_EPS: tl.constexpr,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,  # offsets into the output need 64 bits
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    column_blocks = tl.cdiv(out_channels, BLOCK_COLUMNS)
    steps = tl.cdiv(in_channels, BLOCK_DEPTH)
    tiles = row_blocks * column_blocks
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row_block, column_block = grouped_tile(tile, row_blocks, column_blocks, GROUP_ROWS)
        first_row = row_block * BLOCK_ROWS
        acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for step in range(0, steps):
            a = input.load([first_row, step * BLOCK_DEPTH])
            if in_mean is not None:
                c = step * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
                row_mask = first_row + tl.arange(0, BLOCK_ROWS) < rows
                mask = row_mask[:, None] & (c < in_channels)[None, :]
                a = activation_before(
                    a, mask, c, in_channels, in_mean, in_var, in_weight, in_bias, IN_EPS
                )
            b = weight.load([column_block * BLOCK_COLUMNS, step * BLOCK_DEPTH])
            acc = tl.dot(a, b.T, acc)
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


def _descriptor(tensor: Tensor, columns: int, block: list[int]) -> TensorDescriptor:
    """Of a channels_last tensor as a matrix; TMA reads from addresses in sixteens of bytes."""
    if tensor.data_ptr() % 16:
        tensor = tensor.clone()
    rows = tensor.numel() // columns
    return TensorDescriptor(tensor, [rows, columns], [columns, 1], block)


def launch_conv_1x1(
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    prologue: list[Tensor | None],
    in_eps: float,
    epilogue: list[Tensor | None],
    eps: float,
    residual: Tensor | None,
    relu: bool,
    tile: ConvTile,
    part_mean: Tensor | None,
    part_m2: Tensor | None,
) -> None:
    """Write ``(N, Co, H, W)``, and the partial statistics, from ``(N, Ci, H, W)``.

    The arguments are conv_1x1_fwd_kernel's, all channels_last; input and weight are not empty.
    """
    rows, out_channels = rows_of(output), output.shape[1]
    in_channels = input.shape[1]
    block_depth = tile.block_depth(input.dtype)
    tiles = triton.cdiv(rows, tile.block_rows) * triton.cdiv(out_channels, tile.block_columns)
    # Programs of 4 warps fit a multiprocessor twice.
    places = multiprocessors(input.device) * (8 // tile.num_warps)
    conv_1x1_fwd_kernel[(min(tiles, places),)](
        _descriptor(input, in_channels, [tile.block_rows, block_depth]),
        _descriptor(weight, in_channels, [tile.block_columns, block_depth]),
        output,
        *prologue,
        *epilogue,
        residual,
        part_mean,
        part_m2,
        rows,
        in_channels,
        out_channels,
        IN_EPS=in_eps,
        EPS=eps,
        RELU=relu,
        WIDE=is_wide(output),
        BLOCK_ROWS=tile.block_rows,
        BLOCK_COLUMNS=tile.block_columns,
        BLOCK_DEPTH=block_depth,
        GROUP_ROWS=GROUP_ROWS,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )

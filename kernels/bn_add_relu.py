"""relu(bn(z) [+ residual | + bn(residual)]) in one pass, and its gradient in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    MAX_PARTIALS,
    accumulator,
    channels_last,
    empty_channels_last,
    is_wide,
    parameter_dtype,
    require,
    require_like,
    row_tile,
    rows_of,
    vectors,
)

REDUCE_BLOCK_PARTS = 64
REDUCE_BLOCK_CHANNELS = 16


@triton.jit
def channel_scale(var, weight, c, c_mask, EPS: tl.constexpr, ACC: tl.constexpr):
    scale = 1.0 / tl.sqrt(tl.load(var + c, mask=c_mask, other=1.0).to(ACC) + EPS)
    if weight is not None:
        scale *= tl.load(weight + c, mask=c_mask, other=0.0).to(ACC)
    return scale


@triton.jit
def bn_add_relu_fwd_kernel(
    z,  # (rows, channels)
    mean,  # (channels,)
    var,  # (channels,) biased
    weight,  # (channels,) or None for 1
    bias,  # (channels,) or None for 0
    residual,  # (rows, channels) dtype of z, or None
    residual_mean,  # (channels,) or None for a residual without BatchNorm
    residual_var,  # (channels,) or None
    residual_weight,  # (channels,) or None for 1
    residual_bias,  # (channels,) or None for 0
    output,  # (rows, channels) dtype of z
    rows,
    channels,
    EPS: tl.constexpr,
    RESIDUAL_EPS: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    row = (tl.program_id(0) // channel_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = (tl.program_id(0) % channel_blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    c_mask = c < channels
    mask = (row < rows)[:, None] & c_mask[None, :]
    if WIDE:
        row = row.to(tl.int64)
    offset = row[:, None] * channels + c[None, :]

    value = tl.load(z + offset, mask=mask, other=0.0).to(ACC)
    scale = channel_scale(var, weight, c, c_mask, EPS, ACC)
    value -= tl.load(mean + c, mask=c_mask, other=0.0).to(ACC)[None, :]
    value *= scale[None, :]
    if bias is not None:
        value += tl.load(bias + c, mask=c_mask, other=0.0).to(ACC)[None, :]
    if residual is not None:
        other = tl.load(residual + offset, mask=mask, other=0.0).to(ACC)
        if residual_mean is not None:
            scale = channel_scale(residual_var, residual_weight, c, c_mask, RESIDUAL_EPS, ACC)
            other -= tl.load(residual_mean + c, mask=c_mask, other=0.0).to(ACC)[None, :]
            other *= scale[None, :]
            if residual_bias is not None:
                other += tl.load(residual_bias + c, mask=c_mask, other=0.0).to(ACC)[None, :]
        value += other
    if RELU:
        value = tl.where(value < 0, 0.0, value)
    tl.store(output + offset, value.to(output.dtype.element_ty), mask=mask)


@triton.jit
def bn_add_relu_bwd_kernel(
    dy,  # (rows, channels)
    y,  # (rows, channels) dtype of dy, or None: no ReLU, or its mask is recomputed from z
    z,  # (rows, channels) dtype of dy
    mean,  # (channels,)
    var,  # (channels,) biased
    weight,  # (channels,) or None for 1
    bias,  # (channels,) or None for 0; read only where the mask is recomputed
    residual,  # (rows, channels) dtype of dy, or None for a residual without BatchNorm
    residual_mean,  # (channels,) or None
    residual_var,  # (channels,) or None
    residual_weight,  # (channels,) or None for 1
    dz,  # (rows, channels) dtype of dy
    dresidual,  # (rows, channels) dtype of dy, or None
    part_g,  # (parts, channels) ACC: sum of g
    part_gz,  # (parts, channels) ACC: sum of g * (z - mean)
    part_gr,  # (parts, channels) ACC: sum of g * (residual - residual_mean), or None
    rows,
    channels,
    part_rows,  # rows that one program reads
    EPS: tl.constexpr,
    RESIDUAL_EPS: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    part = tl.program_id(0) // channel_blocks
    c = (tl.program_id(0) % channel_blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    c_mask = c < channels
    first = part * part_rows
    last = tl.minimum(first + part_rows, rows)

    center = tl.load(mean + c, mask=c_mask, other=0.0).to(ACC)[None, :]
    scale = channel_scale(var, weight, c, c_mask, EPS, ACC)[None, :]
    if RELU and y is None:
        shift = tl.zeros((1, BLOCK_CHANNELS), dtype=ACC)
        if bias is not None:
            shift = tl.load(bias + c, mask=c_mask, other=0.0).to(ACC)[None, :]
    if part_gr is not None:
        r_center = tl.load(residual_mean + c, mask=c_mask, other=0.0).to(ACC)[None, :]
        r_scale = channel_scale(residual_var, residual_weight, c, c_mask, RESIDUAL_EPS, ACC)
        sum_gr = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=ACC)
    sum_g = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=ACC)
    sum_gz = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=ACC)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < last)[:, None] & c_mask[None, :]
        if WIDE:
            row = row.to(tl.int64)
        offset = row[:, None] * channels + c[None, :]
        g = tl.load(dy + offset, mask=mask, other=0.0).to(ACC)
        deviation = tl.load(z + offset, mask=mask, other=0.0).to(ACC) - center
        if RELU:
            if y is None:
                g = tl.where(deviation * scale + shift <= 0, 0.0, g)
            else:
                g = tl.where(tl.load(y + offset, mask=mask, other=0.0).to(ACC) <= 0, 0.0, g)
        sum_g += g
        sum_gz += g * deviation
        tl.store(dz + offset, (g * scale).to(dz.dtype.element_ty), mask=mask)
        if part_gr is not None:
            other = tl.load(residual + offset, mask=mask, other=0.0).to(ACC) - r_center
            sum_gr += g * other
            value = (g * r_scale[None, :]).to(dresidual.dtype.element_ty)
            tl.store(dresidual + offset, value, mask=mask)
        elif dresidual is not None:
            tl.store(dresidual + offset, g.to(dresidual.dtype.element_ty), mask=mask)

    offset = part * channels + c
    tl.store(part_g + offset, tl.sum(sum_g, axis=0), mask=c_mask)
    tl.store(part_gz + offset, tl.sum(sum_gz, axis=0), mask=c_mask)
    if part_gr is not None:
        tl.store(part_gr + offset, tl.sum(sum_gr, axis=0), mask=c_mask)


@triton.jit
def bn_reduce_bwd_kernel(
    part_g,  # (parts, channels) ACC: sum of g
    part_gz,  # (parts, channels) ACC: sum of g * (z - mean)
    var,  # (channels,) biased
    weight,  # (channels,) or None for 1
    dmean,  # (channels,) ACC
    dvar,  # (channels,) ACC
    dweight,  # (channels,) ACC, or None without weight and bias
    dbias,  # (channels,) ACC, or None with dweight
    parts,
    channels,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    c_mask = c < channels
    sum_g = tl.zeros((BLOCK_PARTS, BLOCK_CHANNELS), dtype=ACC)
    sum_gz = tl.zeros((BLOCK_PARTS, BLOCK_CHANNELS), dtype=ACC)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        mask = (part < parts)[:, None] & c_mask[None, :]
        offset = part[:, None] * channels + c[None, :]
        sum_g += tl.load(part_g + offset, mask=mask, other=0.0)
        sum_gz += tl.load(part_gz + offset, mask=mask, other=0.0)
    total_g = tl.sum(sum_g, axis=0)
    total_gz = tl.sum(sum_gz, axis=0)
    istd = channel_scale(var, None, c, c_mask, EPS, ACC)
    scale = channel_scale(var, weight, c, c_mask, EPS, ACC)
    tl.store(dmean + c, -scale * total_g, mask=c_mask)
    tl.store(dvar + c, -0.5 * scale * istd * istd * total_gz, mask=c_mask)
    if dweight is not None:
        tl.store(dweight + c, istd * total_gz, mask=c_mask)
    tl.store(dbias + c, total_g, mask=c_mask)


def backward_warps(dtype: torch.dtype) -> int:
    """Warps of the backward's tile: ptxas spills float64's with 8 and float32's with 4."""
    return 4 if dtype == torch.float64 else 8


def reduce_gradients(
    part_g: Tensor, part_gz: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> list[Tensor]:
    """The gradients of BatchNorm's mean, var, weight (empty where it is None) and bias, ``(C,)``.

    part_g and part_gz are ``(parts, C)``: sums of the gradient g of BatchNorm's result, and of
    g * (z - mean). To be called with their device current.
    """
    parts, channels = part_g.shape
    sizes = (channels, channels, 0 if weight is None else channels, channels)
    vectors = [part_g.new_empty(size) for size in sizes]
    if channels:
        bn_reduce_bwd_kernel[(triton.cdiv(channels, REDUCE_BLOCK_CHANNELS),)](
            part_g,
            part_gz,
            var,
            weight,
            *(vector if vector.numel() else None for vector in vectors),
            parts,
            channels,
            EPS=eps,
            ACC=accumulator(part_g.dtype),
            BLOCK_PARTS=REDUCE_BLOCK_PARTS,
            BLOCK_CHANNELS=REDUCE_BLOCK_CHANNELS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return vectors


def _require_pair(op: str, mean: Tensor | None, var: Tensor | None) -> None:
    message = "residual_mean and residual_var must be given together"
    require((mean is None) == (var is None), op, message)


def bn_add_relu(
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_eps: float,
    relu: bool,
) -> Tensor:
    """relu?((z - mean) / sqrt(var + eps) * weight + bias [+ residual | + bn(residual)]).

    z and residual are ``(N, C, H, W)`` of one dtype, the others ``(C,)``. Returns a channels_last
    tensor like z. Raises RuntimeError where shapes, dtypes or devices do not fit.
    """
    op = "bn_add_relu"
    _require_pair(op, residual_mean, residual_var)
    require(z.dim() == 4, op, f"z has {z.dim()} dimensions, expected 4")
    require_like(op, "residual", residual, "z", z)
    channels = z.shape[1]
    mean, var, weight, bias = vectors(op, z, channels, mean=mean, var=var, weight=weight, bias=bias)
    residual_mean, residual_var, residual_weight, residual_bias = vectors(
        op,
        z,
        channels,
        residual_mean=residual_mean,
        residual_var=residual_var,
        residual_weight=residual_weight,
        residual_bias=residual_bias,
    )
    z, residual = channels_last(z), channels_last(residual)
    output = empty_channels_last(z, z.shape)
    rows = rows_of(z)
    if output.numel() == 0:
        return output
    tile = row_tile(channels, 4096)
    grid = (triton.cdiv(rows, tile.block_rows) * triton.cdiv(channels, tile.block_channels),)
    with torch.cuda.device_of(z):
        bn_add_relu_fwd_kernel[grid](
            z,
            mean,
            var,
            weight,
            bias,
            residual,
            residual_mean,
            residual_var,
            residual_weight,
            residual_bias,
            output,
            rows,
            channels,
            EPS=eps,
            RESIDUAL_EPS=residual_eps,
            RELU=relu,
            ACC=accumulator(z.dtype),
            WIDE=is_wide(z),
            BLOCK_ROWS=tile.block_rows,
            BLOCK_CHANNELS=tile.block_channels,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return output


def bn_add_relu_gradients(
    dy: Tensor,
    y: Tensor | None,
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_eps: float,
    relu: bool,
) -> tuple[Tensor, ...]:
    """As bn_add_relu_backward; with y None the ReLU's mask is recomputed from z and bias."""
    channels, rows = z.shape[1], rows_of(z)
    dy, y, z = channels_last(dy), channels_last(y), channels_last(z)
    parameter = mean.new_empty(0, dtype=parameter_dtype(z.dtype))
    dz = empty_channels_last(z, z.shape)
    dresidual = z.new_empty(0) if residual is None else empty_channels_last(z, z.shape)
    projection = residual is not None and residual_mean is not None

    tile = row_tile(channels, 2048)
    part_rows = tile.block_rows * max(1, triton.cdiv(rows, tile.block_rows * MAX_PARTIALS))
    parts = triton.cdiv(rows, part_rows)
    part_g = parameter.new_empty((parts, channels))
    part_gz = torch.empty_like(part_g)
    part_gr = torch.empty_like(part_g) if projection else None

    with torch.cuda.device_of(z):
        if dz.numel():
            blocks = triton.cdiv(channels, tile.block_channels)
            bn_add_relu_bwd_kernel[(parts * blocks,)](
                dy,
                y if relu else None,
                z,
                mean,
                var,
                weight,
                bias,
                channels_last(residual) if projection else None,
                residual_mean if projection else None,
                residual_var if projection else None,
                residual_weight if projection else None,
                dz,
                None if residual is None else dresidual,
                part_g,
                part_gz,
                part_gr,
                rows,
                channels,
                part_rows,
                EPS=eps,
                RESIDUAL_EPS=residual_eps,
                RELU=relu,
                ACC=accumulator(z.dtype),
                WIDE=is_wide(z),
                BLOCK_ROWS=tile.block_rows,
                BLOCK_CHANNELS=tile.block_channels,
                num_warps=backward_warps(z.dtype),
                enable_fp_fusion=True,
            )
        main = reduce_gradients(part_g, part_gz, var, weight, eps)
        if projection:
            branch = reduce_gradients(part_g, part_gr, residual_var, residual_weight, residual_eps)
        else:
            branch = [parameter.new_empty(0) for _ in range(4)]
    return (dz, *main, dresidual, *branch)


def bn_add_relu_backward(
    dy: Tensor,
    y: Tensor,
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_eps: float,
    relu: bool,
) -> tuple[Tensor, ...]:
    """Gradients of bn_add_relu; y is what it returned.

    Returns dz, dmean, dvar, dweight, dbias, dresidual, dresidual_mean, dresidual_var,
    dresidual_weight, dresidual_bias; what does not apply is empty ``(0,)``, as is the gradient
    of a weight that is None. mean and var are independent arguments here: their dependence on z is
    conv_stats' to differentiate.
    """
    op = "bn_add_relu_backward"
    _require_pair(op, residual_mean, residual_var)
    require(z.dim() == 4, op, f"z has {z.dim()} dimensions, expected 4")
    for name, tensor in (("dy", dy), ("y", y), ("residual", residual)):
        require_like(op, name, tensor, "z", z)
    mean, var, weight = vectors(op, z, z.shape[1], mean=mean, var=var, weight=weight)
    residual_mean, residual_var, residual_weight = vectors(
        op,
        z,
        z.shape[1],
        residual_mean=residual_mean,
        residual_var=residual_var,
        residual_weight=residual_weight,
    )
    return bn_add_relu_gradients(
        dy,
        y,
        z,
        mean,
        var,
        weight,
        None,
        eps,
        residual,
        residual_mean,
        residual_var,
        residual_weight,
        residual_eps,
        relu,
    )

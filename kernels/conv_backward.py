"""Gradients of conv_stats, as choice.Gradients says.

The parts: the gradient of the statistics is applied to dz, in a pass or as the products load it;
then the data gradient, masked by the ReLU of the layer before and reduced for its BatchNorm, and
the weight gradient. Either product is ours (conv_gradients), or aten's with passes around it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    accumulator,
    channels_last,
    deterministic_cudnn,
    empty_channels_last,
    is_wide,
    parameter_dtype,
    require,
    require_like,
    row_tile,
    rows_of,
    vectors,
)
from ._tiles import GRADIENTS, tile_of_8_warps
from .bn_add_relu import bn_add_relu, bn_add_relu_gradients
from .choice import choose_conv, target_of
from .conv_gradients import data_gradient, weight_gradient


@triton.jit(do_not_specialize=["rows"])
def conv_stats_bwd_kernel(
    dz,  # (rows, channels)
    z,  # (rows, channels) dtype of dz
    mean,  # (channels,)
    dmean,  # (channels,)
    dvar,  # (channels,)
    output,  # (rows, channels) dtype of dz: the gradient of the convolution's result
    rows,
    channels,
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

    share = 1.0 / rows.to(ACC)
    center = tl.load(mean + c, mask=c_mask, other=0.0).to(ACC)
    constant = tl.load(dmean + c, mask=c_mask, other=0.0).to(ACC) * share
    slope = tl.load(dvar + c, mask=c_mask, other=0.0).to(ACC) * (2.0 * share)
    value = tl.load(z + offset, mask=mask, other=0.0).to(ACC) - center[None, :]
    value = value * slope[None, :] + constant[None, :]
    value += tl.load(dz + offset, mask=mask, other=0.0).to(ACC)
    tl.store(output + offset, value.to(output.dtype.element_ty), mask=mask)


def _apply(dz: Tensor, z: Tensor, mean: Tensor, dmean: Tensor, dvar: Tensor) -> Tensor:
    dz, z = channels_last(dz), channels_last(z)
    output = empty_channels_last(z, z.shape)
    if output.numel() == 0:
        return output
    rows, channels = rows_of(z), z.shape[1]
    tile = row_tile(channels, 4096)
    grid = (triton.cdiv(rows, tile.block_rows) * triton.cdiv(channels, tile.block_channels),)
    with torch.cuda.device_of(z):
        conv_stats_bwd_kernel[grid](
            dz,
            z,
            mean,
            dmean,
            dvar,
            output,
            rows,
            channels,
            ACC=accumulator(z.dtype),
            WIDE=is_wide(z),
            BLOCK_ROWS=tile.block_rows,
            BLOCK_CHANNELS=tile.block_channels,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return output


def _in_format_of(weight: Tensor, dweight: Tensor) -> Tensor:
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        return channels_last(dweight)
    return dweight.contiguous()


def conv_stats_backward(
    dz: Tensor,
    dmean: Tensor,
    dvar: Tensor,
    input: Tensor,
    weight: Tensor,
    z: Tensor,
    mean: Tensor,
    in_mean: Tensor | None,
    in_var: Tensor | None,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    in_eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs_input: bool,
    needs_weight: bool,
    choice: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of conv_stats' input, weight and the prologue's statistics and parameters.

    choice is one of choice.candidates, None for choose_conv's. Returns dinput, dweight, din_mean,
    din_var, din_weight, din_bias; what is not asked for or does not apply is empty ``(0,)``. Raises
    RuntimeError where shapes, dtypes or devices do not fit.
    """
    op = "conv_stats_backward"
    require(z.dim() == 4, op, f"z has {z.dim()} dimensions, expected 4")
    require_like(op, "dz", dz, "z", z)
    mean, dmean, dvar = vectors(op, z, z.shape[1], mean=mean, dmean=dmean, dvar=dvar)
    in_mean, in_var, in_weight, in_bias = vectors(
        op,
        input,
        input.shape[1],
        in_mean=in_mean,
        in_var=in_var,
        in_weight=in_weight,
        in_bias=in_bias,
    )
    absent = [mean.new_empty(0, dtype=parameter_dtype(z.dtype)) for _ in range(4)]
    prologue = [in_mean, in_var, in_weight, in_bias]
    if choice is None:
        name = "conv_stats_backward" if in_mean is None else "bn_conv_stats_backward"
        choice = choose_conv(input, weight, stride, padding, dilation, groups, name)
    how = GRADIENTS[choice]
    input = channels_last(input)
    statistics: list[Tensor | None] = [None] * 4
    if how.apply:
        dconv = channels_last(dz)
        statistics = [channels_last(z), mean, dmean, dvar]
    else:
        dconv = _apply(dz, z, mean, dmean, dvar)
    by_aten = [needs_input and how.dgrad is None, needs_weight and how.wgrad is None, False]
    activation = input
    if in_mean is not None and by_aten[1]:
        none = (None,) * 5
        activation = bn_add_relu(input, *prologue, in_eps, *none, 0.0, True)
    dinput = dweight = z.new_empty(0)
    if any(by_aten):
        with deterministic_cudnn():
            dinput, dweight, _ = torch.ops.aten.convolution_backward(
                dconv,
                activation,
                weight,
                None,
                stride,
                padding,
                dilation,
                False,
                [0, 0],
                groups,
                by_aten,
            )
    product = (channels_last(weight), prologue, in_eps, stride, padding)
    target = target_of(z.device)
    if how.wgrad is not None and needs_weight:
        tile = tile_of_8_warps(how.wgrad, target)
        dweight = weight_gradient(dconv, statistics, input, *product, tile)
    dweight = _in_format_of(weight, dweight) if needs_weight else z.new_empty(0)
    if not needs_input:
        return (z.new_empty(0), dweight, *absent)
    if how.dgrad is not None:
        tile = tile_of_8_warps(how.dgrad, target)
        dinput, *vectors_before = data_gradient(dconv, statistics, input, *product, tile)
        return (dinput, dweight, *(vectors_before or absent))
    if in_mean is None:
        return (channels_last(dinput), dweight, *absent)
    gradients = bn_add_relu_gradients(
        dinput,
        None,
        input,
        *prologue,
        in_eps,
        None,
        None,
        None,
        None,
        0.0,
        True,
    )
    dinput, din_mean, din_var, din_weight, din_bias = gradients[:5]
    if in_bias is None:
        din_bias = absent[3]
    return dinput, dweight, din_mean, din_var, din_weight, din_bias

"""conv_chain: several conv_bn_relu in one call, each of the input or of results before it.

A max-pool may follow each, as it does a ResNet's first: where the kernels can, its windows are
taken from rows that have just been computed, which are not kept.

At batch 1 the way from Python through the dispatcher and back takes a convolution of a ResNet a
third as long again as its computation: the chain takes it once for all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres.ops._register import register_op
from fastres.ops._shapes import check, check_activation, conv_output_shape, new_activation
from fastres.ops.avg_pool_linear import avg_pool_linear_output
from fastres.ops.max_pool2d import pool_output_shape
from fastres.ops.reference import CHAIN_FIELDS, chain_units


def conv_chain(
    input: Tensor,
    tensors: list[Tensor],
    program: list[int],
    eps: list[float],
    fc_weight: Tensor | None = None,
    fc_bias: Tensor | None = None,
) -> Tensor:
    """Return the last of several units' results, each `conv_bn_relu` of results before it.

    A unit's result is what a max-pool makes of it where it has one. With `fc_weight` what is
    returned is `avg_pool_linear` of the last one.

    It has no gradient: `conv_bn_relu` has.

    Args:
        input: (N, C, H, W), float32, bfloat16, float16 or float64; any strides, channels_last
            is fastest.
        tensors: what the program names by its place in this list.
        program: 23 integers a unit: which results are its input and its residual (0 is `input`,
            1 the first unit's result, -1 none), which tensors are its weight, bias, running_mean,
            running_var, bn_weight, bn_bias and packed (-1: None), then stride, padding and
            dilation, two integers each, groups, and whether to apply ReLU; then the max-pool's
            kernel size, stride and padding as in `max_pool2d`, or zeros.
        eps: each unit's.
        fc_weight: (O, C_out), of `input`'s dtype, or None.
        fc_bias: (O,), of `input`'s dtype, or None.

    Returns:
        (N, C_out, H_out, W_out), channels_last, or with `fc_weight` (N, O), of `input`'s dtype.

    Raises:
        RuntimeError: where the program does not fit the tensors, or a tensor its unit.
    """
    result: Tensor = torch.ops.fastres.conv_chain(input, tensors, program, eps, fc_weight, fc_bias)
    return result


def _fake(
    input: Tensor,
    tensors: list[Tensor],
    program: list[int],
    eps: list[float],
    fc_weight: Tensor | None = None,
    fc_bias: Tensor | None = None,
) -> Tensor:
    op = "conv_chain"
    check_activation(op, "input", input)
    units = len(program) // CHAIN_FIELDS
    check(
        units > 0 and len(program) % CHAIN_FIELDS == 0,
        op,
        f"program must have {CHAIN_FIELDS} integers for each of one or more units, "
        f"got {len(program)}",
    )
    check(
        len(eps) == units,
        op,
        f"eps must have one number for each of {units} units, got {len(eps)}",
    )
    results = [input]
    for unit in chain_units(program):
        weight = tensors[unit.weight]
        shape = conv_output_shape(
            op, results[unit.source], weight, unit.stride, unit.padding, unit.dilation, unit.groups
        )
        result = new_activation(input, shape)
        if unit.pool is not None:
            result = new_activation(input, pool_output_shape(op, result, *unit.pool))
        results.append(result)
    if fc_weight is None:
        return results[-1]
    return avg_pool_linear_output(op, results[-1], fc_weight, fc_bias, "fc_")


def _backward(ctx: Any, dy: Tensor) -> None:
    raise RuntimeError(
        "fastres::conv_chain has no derivative: call conv_bn_relu for each unit, which has one"
    )


register_op("conv_chain", _fake, _backward)

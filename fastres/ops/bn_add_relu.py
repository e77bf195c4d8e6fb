"""bn_add_relu: BatchNorm's scale and shift, the residual add and ReLU in one pass (training)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres.ops._register import register_op
from fastres.ops._shapes import (
    check_activation,
    check_like,
    check_vectors,
    new_activation,
    new_vector,
    to_parameter_dtype,
)


def bn_add_relu(
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    residual_mean: Tensor | None = None,
    residual_var: Tensor | None = None,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    residual_eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """Return relu(bn(z) + residual), or relu(bn(z) + bn'(residual)), in one pass over memory.

    bn(z) = (z - mean) / sqrt(var + eps) * weight + bias, per channel, with the given statistics
    (Ioffe and Szegedy 2015, algorithm 1); with `residual_mean` and `residual_var` the residual
    has a BatchNorm of its own, as a projection shortcut does (He et al. 2016, section 3.3).

    Args:
        z: (N, C, H, W), float32, bfloat16, float16 or float64; any strides.
        mean, var: (C,), the mean and the biased variance, of `conv_stats` as a rule.
        weight, bias: (C,) or None, which means 1 and 0.
        eps: added to the variance.
        residual: like `z`, or None.
        residual_mean, residual_var, residual_weight, residual_bias, residual_eps: the same for
            the residual.
        relu: whether to apply ReLU.

    Returns:
        (N, C, H, W), channels_last, of `z`'s dtype.

    Raises:
        RuntimeError: where an argument's shape, dtype or device does not fit; it names it.
    """
    result: Tensor = torch.ops.fastres.bn_add_relu(
        z,
        mean,
        var,
        to_parameter_dtype(weight, z),
        to_parameter_dtype(bias, z),
        eps,
        residual,
        residual_mean,
        residual_var,
        to_parameter_dtype(residual_weight, z),
        to_parameter_dtype(residual_bias, z),
        residual_eps,
        relu,
    )
    return result


def _check(
    op: str,
    z: Tensor,
    residual: Tensor | None,
    vectors: dict[str, Tensor | None],
    residual_vectors: dict[str, Tensor | None],
) -> None:
    check_activation(op, "z", z)
    check_vectors(op, z, z.shape[1], **vectors)
    if residual is not None:
        check_like(op, "residual", residual, "z", z)
    given = [name for name, vector in residual_vectors.items() if vector is not None]
    if given and (residual is None or {"residual_mean", "residual_var"} - set(given)):
        raise RuntimeError(
            f"fastres::{op}: {given[0]} needs residual, residual_mean and residual_var as well"
        )
    check_vectors(op, z, z.shape[1], **residual_vectors)


def _fake(
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
    _check(
        "bn_add_relu",
        z,
        residual,
        {"mean": mean, "var": var, "weight": weight, "bias": bias},
        {
            "residual_mean": residual_mean,
            "residual_var": residual_var,
            "residual_weight": residual_weight,
            "residual_bias": residual_bias,
        },
    )
    return new_activation(z, z.shape)


def _fake_backward(
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
    op = "bn_add_relu_backward"
    _check(
        op,
        z,
        residual,
        {"mean": mean, "var": var, "weight": weight},
        {
            "residual_mean": residual_mean,
            "residual_var": residual_var,
            "residual_weight": residual_weight,
        },
    )
    check_like(op, "dy", dy, "z", z)
    check_like(op, "y", y, "z", z)
    channels = z.shape[1]

    def vector(present: bool) -> Tensor:
        return new_vector(z, channels if present else 0)

    affine = residual_mean is not None
    return (
        new_activation(z, z.shape),
        vector(True),
        vector(True),
        vector(weight is not None),
        vector(True),
        z.new_empty(0) if residual is None else new_activation(z, z.shape),
        vector(affine),
        vector(affine),
        vector(affine and residual_weight is not None),
        vector(affine),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, mean, var, weight, bias, eps, residual, r_mean, r_var, r_weight, r_bias, r_eps, relu = inputs
    # Without ReLU nobody reads y, and who is given it may change it in place: z stands for it.
    y = output if relu else z
    # The plain residual's values are not needed, only that there is one: y can stand for it.
    kept = y if residual is not None and r_mean is None else residual
    ctx.save_for_backward(y, z, mean, var, weight, kept, r_mean, r_var, r_weight)
    ctx.eps, ctx.residual_eps, ctx.relu = eps, r_eps, relu
    ctx.has_bias, ctx.has_residual_bias = bias is not None, r_bias is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    y, z, mean, var, weight, residual, r_mean, r_var, r_weight = ctx.saved_tensors
    return input_gradients(
        dy, y, z, mean, var, weight, ctx.eps, residual, r_mean, r_var, r_weight,
        ctx.residual_eps, ctx.relu, has_bias=ctx.has_bias,
        has_residual_bias=ctx.has_residual_bias,
    )  # fmt: skip


def input_gradients(*call: Any, has_bias: bool, has_residual_bias: bool) -> tuple[Any, ...]:
    """The gradients of bn_add_relu's arguments from a call of bn_add_relu_backward; None: no such.

    Args:
        call: bn_add_relu_backward's arguments.
        has_bias, has_residual_bias: whether bn_add_relu was given these.
    """
    weight, residual, r_mean, r_weight = call[5], call[7], call[8], call[10]
    dz, dmean, dvar, dweight, dbias, dres, dr_mean, dr_var, dr_weight, dr_bias = (
        torch.ops.fastres.bn_add_relu_backward(*call)
    )
    affine = r_mean is not None
    return (
        dz,
        dmean,
        dvar,
        dweight if weight is not None else None,
        dbias if has_bias else None,
        None,
        dres if residual is not None else None,
        dr_mean if affine else None,
        dr_var if affine else None,
        dr_weight if affine and r_weight is not None else None,
        dr_bias if affine and has_residual_bias else None,
        None,
        None,
    )


register_op("bn_add_relu", _fake, _backward, _setup_context)
register_op("bn_add_relu_backward", _fake_backward)

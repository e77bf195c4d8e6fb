"""Every op in plain torch: the specification, and the kernel of every device without one.

Vectors per channel (means, variances, weights, biases) and all arithmetic are in the parameter
dtype: float32 for float32, bfloat16 and float16 tensors, float64 for float64 ones. Functions have
the names and the arguments of the ops' schemas; a result that does not apply has shape (0,).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def parameter_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the vectors beside `tensor`: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def in_transform() -> bool:
    """Whether this is a call of a function that torch.func transforms (grad, vmap, jvp, ...)."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def channels_last(x: Tensor) -> Tensor:
    """x in the layout of every op's result; as it is where vmap knows of no layouts."""
    return x if in_transform() else x.contiguous(memory_format=torch.channels_last)


def _column(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def _scale(var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    scale = torch.rsqrt(var + eps)
    return scale if weight is None else scale * weight


def _affine(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    y = (x.to(mean.dtype) - _column(mean)) * _column(_scale(var, weight, eps))
    return y if bias is None else y + _column(bias)


def _sums(g: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel: sum of g, and sum of g * (x - mean)."""
    return g.sum((0, 2, 3)), (g * (x.to(mean.dtype) - _column(mean))).sum((0, 2, 3))


def _affine_backward(
    g: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `_affine` with respect to x, mean, var, weight and bias."""
    istd = torch.rsqrt(var + eps)
    scale = _scale(var, weight, eps)
    sum_g, sum_gx = _sums(g, x, mean)
    dvar = -0.5 * scale * istd * istd * sum_gx
    return g * _column(scale), -scale * sum_g, dvar, sum_gx * istd, sum_g


def _mask(dy: Tensor, y: Tensor) -> Tensor:
    """The gradient of ReLU from its result y: as in torch, passed on where y is NaN."""
    return dy.masked_fill(y <= 0, 0)


def add_relu(input: Tensor, residual: Tensor) -> Tensor:
    total = input.to(parameter_dtype(input)) + residual.to(parameter_dtype(input))
    return channels_last(F.relu(total).to(input.dtype))


def add_relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    return channels_last(_mask(dy, y))


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
    y = _affine(z, mean, var, weight, bias, eps)
    if residual is not None:
        if residual_mean is None or residual_var is None:
            y = y + residual.to(y.dtype)
        else:
            y = y + _affine(
                residual, residual_mean, residual_var, residual_weight, residual_bias, residual_eps
            )
    if relu:
        y = F.relu(y)
    return channels_last(y.to(z.dtype))


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
    masked = _mask(dy, y) if relu else dy
    g = masked.to(mean.dtype)
    dz, dmean, dvar, dweight, dbias = _affine_backward(g, z, mean, var, weight, eps)
    empty = mean.new_empty(0)
    grads = [_as_result(dz, z), dmean, dvar, dweight if weight is not None else empty, dbias]
    if residual is None:
        return (*grads, z.new_empty(0), empty, empty.clone(), empty.clone(), empty.clone())
    if residual_mean is None or residual_var is None:
        copy = channels_last(masked.clone())
        return (*grads, copy, empty, empty.clone(), empty.clone(), empty.clone())
    dres, dr_mean, dr_var, dr_weight, dr_bias = _affine_backward(
        g, residual, residual_mean, residual_var, residual_weight, residual_eps
    )
    if residual_weight is None:
        dr_weight = empty.clone()
    return (*grads, _as_result(dres, z), dr_mean, dr_var, dr_weight, dr_bias)


def _as_result(x: Tensor, like: Tensor) -> Tensor:
    return channels_last(x.to(like.dtype))


def _before_pool(
    input: Tensor,
    in_mean: Tensor | None,
    in_var: Tensor | None,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    in_eps: float,
) -> Tensor:
    """The previous layer's BatchNorm and ReLU, in the parameter dtype."""
    if in_mean is None or in_var is None:
        return input.to(parameter_dtype(input))
    return F.relu(_affine(input, in_mean, in_var, in_weight, in_bias, in_eps))


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
    a = _before_pool(input, in_mean, in_var, in_weight, in_bias, in_eps)
    return _as_result(F.max_pool2d(a, kernel_size, stride, padding), input)


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
    a = _before_pool(input, in_mean, in_var, in_weight, in_bias, in_eps)
    geometry = (kernel_size, stride, padding, [1, 1], False)
    _, indices = torch.ops.aten.max_pool2d_with_indices(a, *geometry)
    g = torch.ops.aten.max_pool2d_with_indices_backward(dy.to(a.dtype), a, *geometry, indices)
    empty = a.new_empty(0)
    vectors = [empty, empty.clone(), empty.clone(), empty.clone()]
    if in_mean is not None and in_var is not None:
        g, dm, dv, dw, db = _affine_backward(_mask(g, a), input, in_mean, in_var, in_weight, in_eps)
        vectors = [dm, dv, dw if in_weight is not None else vectors[2], vectors[3]]
        if in_bias is not None:
            vectors[3] = db
    return _as_result(g, input), vectors[0], vectors[1], vectors[2], vectors[3]


def avg_pool_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(torch.flatten(F.adaptive_avg_pool2d(input, 1), 1), weight, bias)


def pack_conv_weight(
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    input_size: list[int],
) -> Tensor:
    return weight.new_empty(0, dtype=torch.float32)  # only the CPU's kernels read a packed form


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
) -> Tensor:
    z = F.conv2d(input, weight, None, stride, padding, dilation, groups)
    mean = running_mean if bias is None else running_mean - bias
    return bn_add_relu(
        z, mean, running_var, bn_weight, bn_bias, eps, residual, None, None, None, None, 0.0, relu
    )


def _prologue(
    input: Tensor,
    in_mean: Tensor | None,
    in_var: Tensor | None,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    in_eps: float,
) -> Tensor:
    """The previous layer's BatchNorm and ReLU; padding comes after it."""
    if in_mean is None or in_var is None:
        return input
    return F.relu(_affine(input, in_mean, in_var, in_weight, in_bias, in_eps)).to(input.dtype)


class ChainUnit(NamedTuple):
    """A unit of conv_chain's program."""

    source: int
    residual: int
    tensors: list[int]  # weight, bias, running_mean, running_var, bn_weight, bn_bias, packed
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    relu: bool
    pool: tuple[list[int], list[int], list[int]] | None  # kernel size, stride and padding

    @property
    def weight(self) -> int:
        return self.tensors[0]


CHAIN_FIELDS = 23


def chain_units(program: list[int]) -> Iterator[ChainUnit]:
    """The units of conv_chain's program."""
    for first in range(0, len(program), CHAIN_FIELDS):
        u = program[first : first + CHAIN_FIELDS]
        pool = (u[17:19], u[19:21], u[21:23]) if u[17] != 0 else None
        yield ChainUnit(u[0], u[1], u[2:9], u[9:11], u[11:13], u[13:15], u[15], bool(u[16]), pool)


def conv_chain(
    input: Tensor,
    tensors: list[Tensor],
    program: list[int],
    eps: list[float],
    fc_weight: Tensor | None = None,
    fc_bias: Tensor | None = None,
) -> Tensor:
    results = [input]
    for unit, unit_eps in zip(chain_units(program), eps, strict=True):
        weight, bias, mean, var, bn_weight, bn_bias, packed = (
            tensors[i] if i >= 0 else None for i in unit.tensors
        )
        assert weight is not None and mean is not None and var is not None
        residual = results[unit.residual] if unit.residual >= 0 else None
        result = conv_bn_relu(
            results[unit.source], weight, bias, mean, var, bn_weight, bn_bias, unit_eps, residual,
            unit.stride, unit.padding, unit.dilation, unit.groups, unit.relu, packed,
        )  # fmt: skip
        if unit.pool is not None:
            result = F.max_pool2d(result, *unit.pool)
        results.append(result)
    if fc_weight is None:
        return results[-1]
    return avg_pool_linear(results[-1], fc_weight, fc_bias)


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
) -> tuple[Tensor, Tensor, Tensor]:
    a = _prologue(input, in_mean, in_var, in_weight, in_bias, in_eps)
    z = F.conv2d(a, weight, None, stride, padding, dilation, groups)
    z = channels_last(z)
    exact = z.to(parameter_dtype(z))
    if z.numel() == 0:
        zero = exact.new_zeros(z.shape[1])
        return z, zero, zero.clone()
    var, mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    return z, mean, var


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = max(z.shape[0] * z.shape[2] * z.shape[3], 1)
    total = dz.to(mean.dtype) + _column(dmean / n)
    total = total + _column(dvar * (2 / n)) * (z.to(mean.dtype) - _column(mean))
    a = _prologue(input, in_mean, in_var, in_weight, in_bias, in_eps)
    dinput, dweight, _ = torch.ops.aten.convolution_backward(
        _as_result(total, z), a, weight, None, stride, padding, dilation, False, [0, 0], groups,
        [needs_input, needs_weight, False],
    )  # fmt: skip
    empty = mean.new_empty(0)
    vectors = [empty, empty.clone(), empty.clone(), empty.clone()]
    if not needs_input:
        dinput = z.new_empty(0)
    elif in_mean is not None and in_var is not None:
        g = _mask(dinput.to(mean.dtype), a)
        dx, dm, dv, dw, db = _affine_backward(g, input, in_mean, in_var, in_weight, in_eps)
        dinput = dx
        vectors = [dm, dv, dw if in_weight is not None else vectors[2], vectors[3]]
        if in_bias is not None:
            vectors[3] = db
    if needs_input:
        dinput = _as_result(dinput, z)
    dweight = (
        dweight.contiguous(memory_format=memory_format_of(weight))
        if needs_weight
        else z.new_empty(0)
    )
    return dinput, dweight, vectors[0], vectors[1], vectors[2], vectors[3]


def memory_format_of(weight: Tensor) -> torch.memory_format:
    """The layout of a gradient of `weight`: channels_last only where `weight` has no other."""
    if weight.is_contiguous() or in_transform():
        return torch.contiguous_format
    if weight.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format

"""Every op through the dispatcher: values and gradients against float64, opcheck, compile, errors.

The kernels' own files (test_cpu_*, test_triton_*) test what is particular to them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from cases import (
    HEADS,
    ODD_ACTIVATIONS,
    ODD_CONVS,
    POOLS,
    RESNET_CONVS,
    Activation,
    Conv,
    Head,
    Pool,
)
from fastres import _C, ops
from fastres.ops import reference
from tolerances import assert_within_twice

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5


def small(conv: Conv) -> Conv:
    """The same channels, kernel and stride on a picture that a test can afford."""
    size = min(conv.size, 30 if conv.kernel == 7 else 7)
    name = conv.name.removeprefix("imagenet-").removeprefix("cifar-")
    return Conv(name, conv.c_in, conv.c_out, conv.kernel, conv.stride, size, n=2)


# Both stems' networks have most of their convolutions in common.
CONVS = (*dict.fromkeys(small(conv) for conv in RESNET_CONVS), *ODD_CONVS)


def vectors(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, var, weight and bias of a BatchNorm that has been trained for a while."""
    return (
        torch.randn(channels) * 0.3,
        torch.rand(channels) + 0.5,
        torch.rand(channels) + 0.5,
        torch.randn(channels) * 0.3,
    )


def activation(*shape: int) -> Tensor:
    return torch.randn(*shape).to(memory_format=torch.channels_last)


def conv_input(conv: Conv) -> tuple[Tensor, Tensor]:
    x = activation(conv.n, conv.c_in, conv.size, conv.size)
    fan_in = conv.c_in * conv.kernel**2
    w = torch.randn(conv.c_out, conv.c_in, conv.kernel, conv.kernel) * (2 / fan_in) ** 0.5
    return x, w.to(memory_format=torch.channels_last)


def conv_arguments(conv: Conv) -> tuple[list[int], list[int], list[int], int]:
    return [conv.stride] * 2, [conv.padding] * 2, [1, 1], 1


# What torch computes, layer by layer, in the dtype of its input; statistics as torch's own
# batch_norm takes them.


def torch_conv_bn_relu(x, w, mean, var, weight, bias, residual, conv: Conv, relu: bool) -> Tensor:
    z = F.conv2d(x, w, None, conv.stride, conv.padding)
    y = F.batch_norm(z, mean, var, weight, bias, False, 0.0, EPS)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def batch_norm(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.batch_norm(z, None, None, weight, bias, True, 0.0, EPS)


def torch_training_unit(x, w1, g1, b1, w2, g2, b2, conv: Conv) -> Tensor:
    """conv, bn, relu, conv, bn, add, relu with batch statistics, the first conv being 1x1."""
    a = F.relu(batch_norm(F.conv2d(x, w1), g1, b1))
    y = batch_norm(F.conv2d(a, w2, None, conv.stride, conv.padding), g2, b2)
    return F.relu(y + torch.ones_like(y) * 0.1)


def fastres_training_unit(x, w1, g1, b1, w2, g2, b2, conv: Conv) -> Tensor:
    z1, m1, v1 = ops.conv_stats(x, w1, None, None, None, None, EPS, [1, 1], [0, 0], [1, 1])
    z2, m2, v2 = ops.conv_stats(z1, w2, m1, v1, g1, b1, EPS, *conv_arguments(conv))
    return ops.bn_add_relu(z2, m2, v2, g2, b2, EPS, torch.full_like(z2, 0.1))


def away_from_zero(normalized: Tensor, bias: Tensor) -> Tensor:
    """Biases near `bias`, one a channel, for which no value of normalized + bias is close to zero.

    Where a value lies within a rounding of zero, whether its ReLU passes the gradient is luck, for
    torch as for fastres. Of the intervals between a channel's values, each bias goes to the middle
    of the widest of the 16 nearest.
    """
    rows = normalized.movedim(1, 0).flatten(1).neg().sort().values
    rows = torch.cat([rows[:, :1] - 1, rows, rows[:, -1:] + 1], 1)
    middles, widths = (rows[:, 1:] + rows[:, :-1]) / 2, rows.diff()
    count = min(16, middles.shape[1])
    nearest = (middles - bias[:, None]).abs().topk(count, largest=False).indices
    widest = widths.gather(1, nearest).argmax(1, keepdim=True)
    return middles.gather(1, nearest.gather(1, widest))[:, 0].to(bias.dtype)


def in_dtype(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """4-d tensors in `dtype`; vectors in float32, or float64 where `dtype` is."""
    vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.detach().to(dtype if t.dim() == 4 else vector_dtype) for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_conv_bn_relu_is_as_exact_as_torch(conv: Conv, dtype: torch.dtype) -> None:
    x, w = conv_input(conv)
    with_residual = conv.c_out % 2 == 0
    residual = activation(conv.n, conv.c_out, conv.out, conv.out) if with_residual else None
    tensors = (x, w, *vectors(conv.c_out), *(() if residual is None else (residual,)))
    lowered = in_dtype(tensors, dtype)
    exact = in_dtype(tuple(lowered), torch.float64)

    def by_torch(x, w, mean, var, weight, bias, residual=None):
        return torch_conv_bn_relu(x, w, mean, var, weight, bias, residual, conv, True)

    x, w, mean, var, weight, bias, *rest = lowered
    packed = ops.pack_conv_weight(w, *conv_arguments(conv))
    for packing in (None, packed):
        y = ops.conv_bn_relu(
            x, w, None, mean, var, weight, bias, EPS, rest[0] if rest else None,
            *conv_arguments(conv), True, packing,
        )  # fmt: skip
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_within_twice(y, by_torch(*lowered), by_torch(*exact), factor=conv.factor)


def run_with_gradients(function, tensors: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """The function's results, then the gradient of each of its arguments."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    gradients = [g.to(y.dtype) for g, y in zip(upstream, results, strict=True)]
    return [*(y.detach() for y in results), *torch.autograd.grad(results, leaves, gradients)]


def conv_stats_cases() -> list[tuple[Conv, torch.dtype]]:
    """torch's own float16 convolution backward takes minutes on a CPU where channels are many."""
    return [
        (conv, dtype)
        for conv in CONVS
        for dtype in DTYPES
        if conv.n and (dtype != torch.float16 or max(conv.c_in, conv.c_out, conv.size) <= 128)
    ]


@pytest.mark.parametrize(("conv", "dtype"), conv_stats_cases(), ids=str)
def test_conv_stats_is_as_exact_as_torch(conv: Conv, dtype: torch.dtype) -> None:
    """Values and every gradient, with the previous layer's BatchNorm and ReLU in front."""
    x, w = conv_input(conv)
    lowered = in_dtype((x, w, *vectors(conv.c_in)), dtype)
    exact = in_dtype(tuple(lowered), torch.float64)
    upstream = [torch.randn(conv.n, conv.c_out, conv.out, conv.out), *torch.randn(2, conv.c_out)]
    # What is given must be the same for all three.
    upstream[0] = upstream[0].to(dtype)

    def by_torch(x, w, mean, var, g, b):
        column = [v[:, None, None] for v in (mean, var, g, b)]
        a = (x.to(mean.dtype) - column[0]) * (column[1] + EPS).rsqrt() * column[2] + column[3]
        z = F.conv2d(F.relu(a).to(x.dtype), w, None, conv.stride, conv.padding)
        var, mean = torch.var_mean(z.to(mean.dtype), (0, 2, 3), correction=0)
        return z, mean, var

    def by_fastres(x, w, mean, var, g, b):
        return ops.conv_stats(x, w, mean, var, g, b, EPS, *conv_arguments(conv))

    ours = run_with_gradients(by_fastres, lowered, upstream)
    theirs = run_with_gradients(by_torch, lowered, upstream)
    truth = run_with_gradients(by_torch, exact, upstream)
    names = ("z", "mean", "var", "dx", "dw", "din_mean", "din_var", "din_weight", "din_bias")
    for name, a, b, c in zip(names, ours, theirs, truth, strict=True):
        assert_within_twice(a, b, c, name, conv.factor, computed_in=dtype)


@pytest.mark.parametrize("conv", [conv for conv in CONVS if conv.n and conv.c_in > 1], ids=str)
def test_training_unit_is_as_exact_as_torch(conv: Conv) -> None:
    """Two units in a row, as a block has them: values and every gradient, in float32.

    In 16 bit many a value lies within a rounding of zero, whatever the biases: there the ops are
    judged one by one.
    """
    conv = conv.at(max(conv.size, 4)).batch(4)
    x, w2 = conv_input(conv)
    w1 = torch.randn(conv.c_in, conv.c_in, 1, 1) * (2 / conv.c_in) ** 0.5
    _, _, g1, b1 = vectors(conv.c_in)
    _, _, g2, b2 = vectors(conv.c_out)
    b1 = away_from_zero(batch_norm(F.conv2d(x, w1).double(), g1.double(), None), b1)
    a = F.relu(batch_norm(F.conv2d(x, w1), g1, b1))
    z2 = F.conv2d(a, w2, None, conv.stride, conv.padding)
    b2 = away_from_zero(batch_norm(z2.double(), g2.double(), None) + 0.1, b2)
    tensors = [x, w1, g1, b1, w2, g2, b2]
    upstream = [torch.randn(conv.n, conv.c_out, conv.out, conv.out)]
    ours = run_with_gradients(lambda *t: fastres_training_unit(*t, conv), tensors, upstream)
    theirs = run_with_gradients(lambda *t: torch_training_unit(*t, conv), tensors, upstream)
    exact = in_dtype(tuple(tensors), torch.float64)
    truth = run_with_gradients(lambda *t: torch_training_unit(*t, conv), exact, upstream)
    names = ("y", "dx", "dw1", "dg1", "db1", "dw2", "dg2", "db2")
    for name, a, b, c in zip(names, ours, theirs, truth, strict=True):
        assert_within_twice(a, b, c, name, conv.factor)


def test_conv_stats_where_the_mean_is_large_against_the_deviation() -> None:
    x = activation(8, 16, 16, 16)
    x[:, 0] += 1000
    w = torch.eye(16)[:, :, None, None].contiguous()
    z, mean, var = ops.conv_stats(x, w, None, None, None, None, EPS, [1, 1], [0, 0], [1, 1])
    exact = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), exact[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shortcut", ["none", "identity", "projection"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_ACTIVATIONS, ids=str)
def test_bn_add_relu_is_as_exact_as_torch(
    case: Activation, dtype: torch.dtype, shortcut: str
) -> None:
    tensors = [activation(*case.shape), *vectors(case.c)]
    if shortcut != "none":
        tensors.append(activation(*case.shape))
    if shortcut == "projection":
        tensors += vectors(case.c)
    lowered = in_dtype(tuple(tensors), dtype)
    exact = in_dtype(tuple(lowered), torch.float64)
    dy = activation(*case.shape)

    def by_torch(z, mean, var, g, b, r=None, r_mean=None, r_var=None, r_g=None, r_b=None):
        def bn(x, mean, var, g, b):
            column = [v[:, None, None] for v in (mean, var, g, b)]
            exact = x.to(mean.dtype)
            y = (exact - column[0]) * (column[1] + EPS).rsqrt() * column[2] + column[3]
            return y.to(x.dtype)

        y = bn(z, mean, var, g, b)
        if r is not None:
            y = y + (r if r_mean is None else bn(r, r_mean, r_var, r_g, r_b))
        return F.relu(y)

    def by_fastres(z, mean, var, g, b, *residual):
        return ops.bn_add_relu(z, mean, var, g, b, EPS, *residual)

    upstream = [dy.to(dtype)]
    ours = run_with_gradients(by_fastres, lowered, upstream)
    theirs = run_with_gradients(by_torch, lowered, upstream)
    truth = run_with_gradients(by_torch, exact, upstream)
    for i, results in enumerate(zip(ours, theirs, truth, strict=True)):
        assert_within_twice(*results, f"result {i}", computed_in=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_ACTIVATIONS, ids=str)
def test_add_relu_is_torchs(case: Activation, dtype: torch.dtype) -> None:
    x, r = (activation(*case.shape).to(dtype).requires_grad_() for _ in range(2))
    dy = activation(*case.shape).to(dtype)
    y = ops.add_relu(x, r)
    expected = F.relu(x + r)
    assert torch.equal(y, expected)
    ours, theirs = torch.autograd.grad(y, (x, r), dy), torch.autograd.grad(expected, (x, r), dy)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("with_prologue", [False, True], ids=["alone", "bn-relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", [pool for pool in POOLS if pool.n], ids=str)
def test_max_pool2d_is_as_exact_as_torch(
    pool: Pool, dtype: torch.dtype, with_prologue: bool
) -> None:
    """Values and every gradient, with the previous layer's BatchNorm and ReLU in front or not."""
    # Of few bits: for all three the same values are equal, and no others.
    x = activation(*pool.shape).bfloat16().float()
    lowered = in_dtype((x, *vectors(pool.c)) if with_prologue else (x,), dtype)
    exact = in_dtype(tuple(lowered), torch.float64)
    upstream = [torch.randn(pool.out).to(dtype)]

    def by_torch(x, mean=None, var=None, g=None, b=None):
        if mean is not None:
            column = [v[:, None, None] for v in (mean, var, g, b)]
            a = (x.to(mean.dtype) - column[0]) * (column[1] + EPS).rsqrt() * column[2] + column[3]
            # Rounded to 16 bits, more of them would be equal than there are.
            return F.max_pool2d(F.relu(a), *pool.geometry).to(x.dtype)
        return F.max_pool2d(x, *pool.geometry)

    def by_fastres(x, *vectors):
        return ops.max_pool2d(x, *pool.geometry, *vectors, *((EPS,) if vectors else ()))

    ours = run_with_gradients(by_fastres, lowered, upstream)
    theirs = run_with_gradients(by_torch, lowered, upstream)
    truth = run_with_gradients(by_torch, exact, upstream)
    names = ("y", "dx", "din_mean", "din_var", "din_weight", "din_bias")
    for name, *results in zip(names[: len(ours)], ours, theirs, truth, strict=True):
        assert_within_twice(*results, name, computed_in=dtype)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [head for head in HEADS if head.n], ids=str)
def test_avg_pool_linear_is_as_exact_as_torch(
    head: Head, dtype: torch.dtype, with_bias: bool
) -> None:
    """Values and every gradient."""
    weight = torch.randn(head.outputs, head.c) / head.c**0.5
    given = (F.relu(activation(*head.shape)), weight, torch.randn(head.outputs))
    lowered = [t.to(dtype) for t in given[: 2 + with_bias]]
    upstream = [torch.randn(head.n, head.outputs).to(dtype)]

    def by_torch(x, weight, bias=None):
        return F.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1), weight, bias)

    ours = run_with_gradients(ops.avg_pool_linear, lowered, upstream)
    theirs = run_with_gradients(by_torch, lowered, upstream)
    truth = run_with_gradients(by_torch, [t.double() for t in lowered], upstream)
    names = ("y", "dx", "dweight", "dbias")
    for name, *results in zip(names[: len(ours)], ours, theirs, truth, strict=True):
        assert_within_twice(*results, name)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other strides, some of them inside a larger tensor."""
    n, c, h, w = x.shape
    larger = torch.full((n + 1, c + 3, h + 2, w + 4), float("nan"))
    larger = larger.to(memory_format=torch.channels_last)
    larger[1:, 2 : c + 2, 1 : h + 1, 3 : w + 3] = x
    spaced = torch.full((n, c, h, 2 * w), float("nan"))
    spaced[..., ::2] = x
    return {
        "channels_first": x.contiguous(),
        "slice": larger[1:, 2 : c + 2, 1 : h + 1, 3 : w + 3],
        "every_second": spaced[..., ::2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("layout", ["channels_first", "slice", "every_second", "transposed"])
def test_any_strides_give_the_same_answer(layout: str) -> None:
    conv = Conv("layout", 20, 18, 3, 1, 9, n=2)
    x, w = conv_input(conv)
    mean, var, g, b = vectors(20)
    m2, v2, g2, b2 = vectors(18)
    r = activation(2, 18, 9, 9)
    rest = conv_arguments(conv)

    def all_ops(x: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.requires_grad_() for t in (x.detach(), w.detach(), r.detach())]
        x, w, r = leaves
        y = ops.conv_bn_relu(x, w, None, m2, v2, g2, b2, EPS, r, *rest)
        z, zm, zv = ops.conv_stats(x, w, mean, var, g, b, EPS, *rest)
        out = ops.bn_add_relu(z, zm, zv, g2, b2, EPS, r)
        total = ops.max_pool2d(ops.add_relu(y, out), [3, 3], [2, 2], [1, 1], m2, v2, g2, b2)
        return y, z, zm, zv, out, total, *torch.autograd.grad(total.square().sum(), leaves)

    expected = all_ops(x, w, r)
    actual = all_ops(layouts(x)[layout], layouts(w)[layout], layouts(r)[layout])
    # torch's convolutions sum in another order for another layout; ours, the forward's, do not.
    ours = _C.cpu_capability() != "baseline"
    for i, (a, b_) in enumerate(zip(actual, expected, strict=True)):
        assert not ours or i >= 6 or torch.equal(a, b_), f"forward result {i}"
        torch.testing.assert_close(a, b_, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_pass_as_in_torch(value: float) -> None:
    x = activation(1, 32, 6, 6)
    x[0, 3, 2, 2] = value
    w = torch.randn(32, 32, 3, 3)
    m, v, g, b = vectors(32)
    conv = Conv("nan", 32, 32, 3, 1, 6)
    ours = ops.conv_bn_relu(x, w, None, m, v, g, b, EPS, None, *conv_arguments(conv))
    theirs = torch_conv_bn_relu(x, w, m, v, g, b, None, conv, True)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())
    r = torch.zeros_like(x)
    assert torch.equal(ops.add_relu(x, r), F.relu(x + r)) or value != value
    assert torch.equal(ops.add_relu(x, r).isnan(), F.relu(x + r).isnan())
    leaf, theirs_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(ops.add_relu(leaf, r).sum(), leaf)
    (theirs_dx,) = torch.autograd.grad(F.relu(theirs_leaf + r).sum(), theirs_leaf)
    assert torch.equal(dx, theirs_dx)


def opcheck_arguments(dtype: torch.dtype) -> dict[str, tuple]:
    def leaf(*shape: int) -> Tensor:
        x = torch.randn(*shape)
        return (x.to(dtype) if len(shape) == 4 else x.abs() + 0.1).requires_grad_()

    x, w, r = leaf(2, 5, 7, 6), leaf(4, 5, 3, 3), leaf(2, 4, 7, 6)
    v5 = [leaf(5) for _ in range(4)]
    v4 = [leaf(4) for _ in range(8)]
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    window = ([3, 3], [2, 2], [1, 1])
    z, pooled = leaf(2, 4, 7, 6), leaf(2, 4, 4, 3).detach()
    plain = [t.detach() for t in (z, r, x, w)]
    fixed4, fixed5 = [t.detach() for t in v4], [t.detach() for t in v5]
    none3 = (None, None, None)
    head = [t.detach().to(dtype).requires_grad_() for t in (leaf(3, 5), leaf(3))]
    return {
        "add_relu": (z, r),
        "add_relu_backward": (plain[0], plain[1]),
        "bn_add_relu": (z, *v4[:4], EPS, r, None, *none3, EPS, True),
        "bn_add_relu_backward": (
            plain[0], plain[1], plain[0], *fixed4[:3], EPS, plain[1], *fixed4[4:7], EPS, True,
        ),
        "max_pool2d": (z, *window, *v4[:4], EPS),
        "max_pool2d_backward": (pooled, plain[0], *window, *fixed4[:4], EPS),
        "avg_pool_linear": (x, *head),
        "pack_conv_weight": (w, *geometry, []),
        "conv_bn_relu": (x, w, None, *fixed4[:2], *v4[2:4], EPS, r, *geometry, True, None),
        "conv_stats": (x, w, *v5, EPS, *geometry),
        "conv_stats_backward": (
            plain[0], *fixed4[:2], plain[2], plain[3], plain[1], fixed4[2], *fixed5, EPS,
            *geometry, True, True,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(opcheck_arguments(torch.float32)))
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    op = getattr(torch.ops.fastres, name).default
    torch.library.opcheck(op, opcheck_arguments(dtype)[name])


def test_projection_and_no_affine_pass_opcheck() -> None:
    z, r = (torch.randn(2, 4, 3, 3, requires_grad=True) for _ in range(2))
    v = [(torch.rand(4) + 0.1).requires_grad_() for _ in range(8)]
    op = torch.ops.fastres.bn_add_relu.default
    torch.library.opcheck(op, (z, *v[:4], EPS, r, *v[4:], EPS, True))
    torch.library.opcheck(op, (z, *v[:2], None, None, EPS, r, *v[4:6], None, None, EPS, False))
    torch.library.opcheck(op, (z, *v[:4], EPS, None, None, None, None, None, EPS, True))


def test_max_pool2d_alone_and_without_affine_passes_opcheck() -> None:
    z = torch.randn(2, 5, 7, 6, requires_grad=True)
    v = [(torch.rand(5) + 0.1).requires_grad_() for _ in range(2)]
    op, window = torch.ops.fastres.max_pool2d.default, ([3, 2], [2, 1], [1, 0])
    torch.library.opcheck(op, (z, *window, None, None, None, None, 0.0))
    torch.library.opcheck(op, (z, *window, *v, None, None, EPS))


def test_avg_pool_linear_without_a_bias_and_of_nothing_passes_opcheck() -> None:
    op = torch.ops.fastres.avg_pool_linear.default
    x, weight, bias = double(2, 5, 3, 4), double(3, 5), double(3)
    torch.library.opcheck(op, (x, weight, None))
    torch.library.opcheck(op, (x.detach()[:0].requires_grad_(), weight, bias))


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)


def positive(channels: int) -> Tensor:
    return (torch.rand(channels, dtype=torch.double) + 0.5).requires_grad_()


@pytest.mark.parametrize("geometry", [(3, 1, 1, 1), (3, 2, 1, 1), (1, 2, 1, 1), (3, 1, 2, 2)])
def test_conv_gradients_by_gradcheck(geometry: tuple[int, int, int, int]) -> None:
    kernel, stride, dilation, groups = geometry
    rest = ([stride] * 2, [kernel // 2] * 2, [dilation] * 2, groups)
    x, w = double(2, 4, 6, 5), double(6, 4 // groups, kernel, kernel)
    prologue = (double(4), positive(4), double(4), double(4))
    assert torch.autograd.gradcheck(
        lambda *args: ops.conv_stats(*args, EPS, *rest), (x, w, *prologue)
    )
    assert torch.autograd.gradcheck(
        lambda x, w: ops.conv_stats(x, w, None, None, None, None, EPS, *rest), (x, w)
    )
    bn = (double(6), double(6), positive(6), double(6), double(6))
    y = ops.conv_bn_relu(x, w, *bn, EPS, None, *rest)
    residual = double(*y.shape)
    assert torch.autograd.gradcheck(
        lambda x, w, b, m, v, g, t, r: ops.conv_bn_relu(x, w, b, m, v, g, t, EPS, r, *rest),
        (x, w, *bn, residual),
    )


def test_other_gradients_by_gradcheck() -> None:
    z, r = double(2, 4, 3, 5), double(2, 4, 3, 5)
    bn, bn2 = ((double(4), positive(4), double(4), double(4)) for _ in range(2))
    assert torch.autograd.gradcheck(ops.add_relu, (z, r))
    assert torch.autograd.gradcheck(lambda z, *v: ops.bn_add_relu(z, *v, EPS), (z, *bn))
    assert torch.autograd.gradcheck(
        lambda z, r, *v: ops.bn_add_relu(z, *v[:4], EPS, r, *v[4:], EPS), (z, r, *bn, *bn2)
    )


def test_max_pool2d_gradients_by_gradcheck() -> None:
    # Apart by more than gradcheck's step, so that no maximum changes place.
    x = (torch.randperm(2 * 4 * 6 * 5).double() / 50 - 2).reshape(2, 4, 6, 5).requires_grad_()
    bn = (double(4), positive(4), double(4), double(4))
    for window in (([3, 3], [2, 2], [1, 1]), ([2, 3], [3, 1], [0, 1])):
        assert torch.autograd.gradcheck(lambda x, w=window: ops.max_pool2d(x, *w), x)
        assert torch.autograd.gradcheck(
            lambda *args, w=window: ops.max_pool2d(args[0], *w, *args[1:], EPS), (x, *bn)
        )
        assert torch.autograd.gradcheck(
            lambda x, m, v, w=window: ops.max_pool2d(x, *w, m, v), (x, *bn[:2])
        )


def test_avg_pool_linear_gradients_by_gradcheck() -> None:
    x, weight, bias = double(2, 4, 3, 5), double(6, 4), double(6)
    assert torch.autograd.gradcheck(ops.avg_pool_linear, (x, weight, bias))
    assert torch.autograd.gradcheck(ops.avg_pool_linear, (x, weight))


def differentiable() -> dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]]:
    """For every op with a gradient: a call in float64, and its arguments that have one."""
    x, w, r = double(2, 2, 3, 2), double(3, 2, 3, 3), double(2, 3, 3, 2)
    bn, bn2 = ((double(3), positive(3), double(3), double(3)) for _ in range(2))
    prologue = (double(2), positive(2), double(2), double(2))
    apart = (torch.randperm(2 * 3 * 5 * 4).double() / 50 - 1).reshape(2, 3, 5, 4).requires_grad_()
    conv, window = ([1, 1], [1, 1], [1, 1], 1), ([3, 3], [2, 2], [1, 1])
    return {
        "add_relu": (ops.add_relu, (r, double(2, 3, 3, 2))),
        "bn_add_relu": (
            lambda z, r, *v: ops.bn_add_relu(z, *v[:4], EPS, r, *v[4:], EPS),
            (double(2, 3, 3, 2), r, *bn, *bn2),
        ),
        "bn_add_relu of a plain residual": (
            lambda z, r, m, v: ops.bn_add_relu(z, m, v, None, None, EPS, r),
            (double(2, 3, 3, 2), r, *bn[:2]),
        ),
        "conv_stats": (lambda *args: ops.conv_stats(*args, EPS, *conv), (x, w, *prologue)),
        "conv_stats without a prologue": (
            lambda x, w: ops.conv_stats(x, w, None, None, None, None, EPS, *conv),
            (x, w),
        ),
        "conv_bn_relu": (
            lambda x, w, r, *v: ops.conv_bn_relu(x, w, None, *v, EPS, r, *conv),
            (x, w, r, *bn),
        ),
        "max_pool2d": (lambda x: ops.max_pool2d(x, *window), (apart,)),
        "max_pool2d of a BatchNorm": (
            lambda x, *v: ops.max_pool2d(x, *window, *v, EPS),
            (apart, *bn),
        ),
        "avg_pool_linear": (ops.avg_pool_linear, (x, double(4, 2), double(4))),
        "avg_pool_linear without a bias": (ops.avg_pool_linear, (x, double(4, 2))),
    }


@pytest.mark.parametrize("what", differentiable())
def test_second_derivatives_by_gradgradcheck(what: str) -> None:
    call, arguments = differentiable()[what]
    assert torch.autograd.gradgradcheck(call, arguments, fast_mode=True)


@pytest.mark.parametrize("what", differentiable())
def test_transforms_of_torch_func(what: str) -> None:
    call, arguments = differentiable()[what]
    results = call(*arguments)
    gradients = tree_map(torch.randn_like, results)
    flat = (lambda x: x) if isinstance(results, tuple) else (lambda x: (x,))
    expected = torch.autograd.grad(flat(results), arguments, flat(gradients))
    values = tuple(x.detach() for x in arguments)
    same, backward = torch.func.vjp(call, *values)
    torch.testing.assert_close((same, backward(gradients)), (results, expected))
    tangents = tuple(torch.randn_like(x) for x in values)
    _, forward = torch.func.jvp(call, values, tangents)
    # The two are each other's transpose.
    torch.testing.assert_close(inner(flat(gradients), flat(forward)), inner(expected, tangents))
    moved = tuple(x.flip(0) for x in values)
    both = torch.func.vmap(call)(*(torch.stack(pair) for pair in zip(values, moved, strict=True)))
    separate = flat(call(*values)), flat(call(*moved))
    for i, one in enumerate(separate):
        torch.testing.assert_close(tuple(x[i] for x in flat(both)), one)


def inner(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(training: bool) -> None:
    conv = Conv("compile", 8, 12, 3, 1, 6, n=2)
    x, w = conv_input(conv)
    m, v, g, b = vectors(12)

    def unit(x: Tensor, w: Tensor, g: Tensor, b: Tensor) -> Tensor:
        if training:
            z, mean, var = ops.conv_stats(x, w, None, None, None, None, EPS, *conv_arguments(conv))
            y = ops.bn_add_relu(z, mean, var, g, b, EPS, z)
            return ops.max_pool2d(y, [3, 3], [2, 2], [1, 1], mean, var, g, b)
        y = ops.conv_bn_relu(x, w, None, m, v, g, b, EPS, None, *conv_arguments(conv))
        return ops.max_pool2d(ops.add_relu(y, y), [3, 3], [2, 2], [1, 1])

    def gradients(function) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, w, g, b)]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager", dynamic=True)
    for ours, eager in zip(gradients(compiled), gradients(unit), strict=True):
        torch.testing.assert_close(ours, eager)


def bad_calls() -> dict[str, tuple]:
    """Calls that must be refused: (what the message must name, the call)."""
    conv = Conv("bad", 4, 6, 3, 1, 8, n=2)
    x, w = conv_input(conv)
    v4, v6 = vectors(4), vectors(6)
    z = activation(2, 6, 8, 8)
    g = conv_arguments(conv)
    none = (None,) * 4

    def fused(x=x, w=w, bn=v6, residual=None, geometry=g):
        return ops.conv_bn_relu(x, w, None, *bn, EPS, residual, *geometry)

    def stats(x=x, w=w, prologue=none, geometry=g):
        return ops.conv_stats(x, w, *prologue, EPS, *geometry)

    def norm(z=z, bn=v6, *rest):
        return ops.bn_add_relu(z, *bn, EPS, *rest)

    window = ([3, 3], [2, 2], [1, 1])

    def pool(z=z, window=window, *prologue):
        return ops.max_pool2d(z, *window, *prologue)

    head_weight, head_bias = torch.randn(3, 6), torch.randn(3)

    def head(z=z, weight=head_weight, bias=head_bias):
        return ops.avg_pool_linear(z, weight, bias)

    return {
        "rank of input": ("input", lambda: fused(x[0])),
        "dtype of input": ("input", lambda: fused(x.int(), w.int())),
        "dtype of weight": ("weight", lambda: fused(x, w.double())),
        "channels of weight": ("weight", lambda: fused(x, w[:, :3])),
        "rank of weight": ("weight", lambda: stats(x, w[0])),
        "length of running_mean": ("running_mean", lambda: fused(bn=(v4[0], *v6[1:]))),
        "rank of bn_weight": ("bn_weight", lambda: fused(bn=(*v6[:2], v6[2][:, None], v6[3]))),
        "shape of residual": ("residual", lambda: fused(residual=z[:, :, :7])),
        "dtype of residual": ("residual", lambda: fused(residual=z.double())),
        "stride zero": ("stride", lambda: fused(geometry=([0, 1], *g[1:]))),
        "stride of three": ("stride", lambda: fused(geometry=([1, 1, 1], *g[1:]))),
        "negative padding": ("padding", lambda: stats(geometry=(g[0], [-1, 0], *g[2:]))),
        "dilation zero": ("dilation", lambda: stats(geometry=(*g[:2], [0, 0], 1))),
        "groups": ("groups", lambda: stats(geometry=(*g[:3], 3))),
        "groups zero": ("groups", lambda: stats(geometry=(*g[:3], 0))),
        "too small": ("input", lambda: stats(x[:, :, :1, :1], geometry=(g[0], [0, 0], *g[2:]))),
        "in_mean alone": ("in_var", lambda: stats(prologue=(v4[0], None, None, None))),
        "in_weight alone": ("in_mean", lambda: stats(prologue=(None, None, v4[2], None))),
        "length of in_mean": ("in_mean", lambda: stats(prologue=(v6[0], *v4[1:]))),
        "length of mean": ("mean", lambda: norm(z, (v4[0], *v6[1:]))),
        "length of bias": ("bias", lambda: norm(z, (*v6[:3], v4[3]))),
        "bn residual": ("residual", lambda: norm(z, v6, z[:1])),
        "residual_mean alone": ("residual_mean", lambda: norm(z, v6, None, v6[0], v6[1])),
        "residual_var missing": ("residual_mean", lambda: norm(z, v6, z, v6[0])),
        "add_relu rank": ("input", lambda: ops.add_relu(z[0], z[0])),
        "add_relu shape": ("residual", lambda: ops.add_relu(z, z[:, :1])),
        "add_relu dtype": ("residual", lambda: ops.add_relu(z, z.half())),
        "add_relu device": ("residual", lambda: ops.add_relu(z, z.to("meta"))),
        "pool rank": ("input", lambda: pool(z[0])),
        "pool dtype": ("input", lambda: pool(z.int())),
        "pool too small": ("input", lambda: pool(z, ([11, 3], [2, 2], [1, 1]))),
        "pool no pixels": ("input", lambda: pool(z[..., :0])),
        "pool kernel": ("kernel_size", lambda: pool(z, ([0, 3], [2, 2], [0, 1]))),
        "pool kernel of one": ("kernel_size", lambda: pool(z, ([3], [2, 2], [1, 1]))),
        "pool stride": ("stride", lambda: pool(z, ([3, 3], [2, 0], [1, 1]))),
        "pool padding": ("padding", lambda: pool(z, ([3, 3], [2, 2], [2, 1]))),
        "pool negative padding": ("padding", lambda: pool(z, ([3, 3], [2, 2], [-1, 1]))),
        "pool in_mean alone": ("in_var", lambda: pool(z, window, v6[0])),
        "pool length of in_var": ("in_var", lambda: pool(z, window, v6[0], v4[1])),
        "head rank": ("input", lambda: head(z[0])),
        "head dtype": ("input", lambda: head(z.int())),
        "head weight of other channels": ("weight", lambda: head(weight=head_weight[:, :5])),
        "head rank of weight": ("weight", lambda: head(weight=head_weight[0])),
        "head dtype of weight": ("weight", lambda: head(z.half())),
        "head length of bias": ("bias", lambda: head(bias=head_bias[:1])),
        "head dtype of bias": ("bias", lambda: head(bias=head_bias.double())),
        "head device of weight": ("weight", lambda: head(weight=head_weight.to("meta"))),
        "pack rank": ("weight", lambda: ops.pack_conv_weight(w[0], *g)),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_a_bad_argument_is_named(name: str) -> None:
    argument, call = bad_calls()[name]
    with pytest.raises(RuntimeError, match=rf"fastres::\w+: .*\b{argument}\b"):
        call()


@pytest.mark.parametrize("name", [n for n in bad_calls() if "device" not in n])
def test_a_bad_argument_is_named_while_tracing(name: str) -> None:
    """The shape functions refuse what the kernels refuse."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    argument, _ = bad_calls()[name]
    with FakeTensorMode(), pytest.raises(RuntimeError, match=rf"fastres::\w+: .*\b{argument}\b"):
        bad_calls()[name][1]()


def test_the_reference_serves_devices_without_kernels() -> None:
    for name in opcheck_arguments(torch.float32):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fastres::{name}", "XPU")
        assert callable(getattr(reference, name))


@pytest.mark.parametrize(
    "name", sorted(opcheck_arguments(torch.float32).keys() - {"pack_conv_weight"})
)
def test_the_cpu_kernel_agrees_with_the_reference(name: str) -> None:
    arguments = opcheck_arguments(torch.float32)[name]
    ours = getattr(torch.ops.fastres, name)(*arguments)
    expected = getattr(reference, name)(*arguments)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)

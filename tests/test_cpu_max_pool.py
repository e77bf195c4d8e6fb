"""The CPU kernels of max_pool2d and of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import POOLS, Pool
from fastres import _C
from fastres.ops import reference
from running import on_other_instruction_sets, run_tests
from tolerances import assert_within_twice

OPS = torch.ops.fastres
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NONE = (None, None, None, None, 0.0)
EPS = 1e-5
GRADIENTS = ("dinput", "din_mean", "din_var", "din_weight", "din_bias")


def channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal values of few bits: every dtype has them exactly, and many are equal."""
    values = torch.randn(shape).bfloat16().to(dtype)
    return values.contiguous(memory_format=torch.channels_last)


def prologue(channels: int, dtype: torch.dtype, affine: bool = True) -> tuple:
    """mean, var, weight, bias and eps of a BatchNorm."""
    mean, bias = torch.randn(2, channels) * 0.3
    var, weight = torch.rand(2, channels) + 0.5
    weight[::3] *= -1
    vectors = (mean, var, *((weight, bias) if affine else ()))
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    given = [v.to(parameter_dtype) for v in vectors]
    return (*given, *(None,) * (4 - len(given)), EPS)


def torch_gradient(dy: Tensor, x: Tensor, pool: Pool) -> Tensor:
    """torch's, added up in float32 for 16-bit tensors."""
    exact = x.to(reference.parameter_dtype(x))
    geometry = (*pool.geometry, [1, 1], False)
    _, indices = torch.ops.aten.max_pool2d_with_indices(exact, *geometry)
    gradient = torch.ops.aten.max_pool2d_with_indices_backward(
        dy.to(exact.dtype), exact, *geometry, indices
    )
    return gradient.to(x.dtype)


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_values_and_gradient_are_torchs(pool: Pool, dtype: torch.dtype) -> None:
    x, dy = channels_last(pool.shape, dtype), channels_last(pool.out, dtype)
    y = OPS.max_pool2d(x, *pool.geometry, *NONE)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(y, F.max_pool2d(x, *pool.geometry))
    dx, *vectors = OPS.max_pool2d_backward(dy, x, *pool.geometry, *NONE)
    assert dx.dtype == dtype and dx.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(dx, torch_gradient(dy, x, pool))
    assert all(v.shape == (0,) for v in vectors)


@pytest.mark.parametrize("channels", [3, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_are_torchs(dtype: torch.dtype, channels: int) -> None:
    pool = Pool("special", 4, channels, 21, 23)
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, inf, -inf, nan, -2.0, -3.0], dtype=dtype)
    chosen = torch.randint(9, pool.shape)
    chosen[1].clamp_(max=5)  # one image without a NaN, one of few, one of -inf only
    chosen[2] = torch.where(torch.rand(pool.shape[1:]) < 0.05, 6, 3)
    chosen[3] = 5
    x = values[chosen].contiguous(memory_format=torch.channels_last)
    y, want = OPS.max_pool2d(x, *pool.geometry, *NONE), F.max_pool2d(x, *pool.geometry)
    assert_same_bits(y, want)
    assert torch.equal(y.signbit()[~y.isnan()], want.signbit()[~y.isnan()])
    assert y[2].isnan().any() and not y[2].isnan().all() and (y[3] == -inf).all()
    # In powers of two no sum is rounded: every window's share is seen.
    dy = torch.randint(1, 9, pool.out).to(dtype)
    dy[0, 0, 0, :3] = torch.tensor([nan, inf, -inf])
    dx = OPS.max_pool2d_backward(dy, x, *pool.geometry, *NONE)[0]
    assert_same_bits(dx, torch_gradient(dy, x, pool))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_prologue_against_float64(pool: Pool, dtype: torch.dtype) -> None:
    x, dy = channels_last(pool.shape, dtype), channels_last(pool.out, dtype)
    vectors = prologue(pool.c, dtype)
    exact_vectors = (*(v.double() for v in vectors[:4]), EPS)

    def results(ops, x: Tensor, dy: Tensor, vectors: tuple) -> tuple[Tensor, ...]:
        y = ops.max_pool2d(x, *pool.geometry, *vectors)
        return (y, *ops.max_pool2d_backward(dy, x, *pool.geometry, *vectors))

    leaves = [t.double().clone().requires_grad_() for t in (x, *exact_vectors[:4])]
    columns = [v[:, None, None] for v in leaves[1:]]
    normal = (leaves[0] - columns[0]) / torch.sqrt(columns[1] + EPS) * columns[2] + columns[3]
    exact = F.max_pool2d(F.relu(normal), *pool.geometry)
    exact_gradients = torch.autograd.grad(exact, leaves, dy.double())

    ours = results(OPS, x, dy, vectors)
    theirs = results(reference, x, dy, vectors)
    truth = (exact.detach(), *exact_gradients)
    for name, a, b, c in zip(("y", *GRADIENTS), ours, theirs, truth, strict=True):
        assert a.dtype == (dtype if a.dim() == 4 else reference.parameter_dtype(x)), name
        assert a.dim() == 1 or a.is_contiguous(memory_format=torch.channels_last), name
        assert_within_twice(a, b, c, name, computed_in=dtype)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("zero", [True, False])
def test_prologue_variants(affine: bool, zero: bool) -> None:
    pool = Pool("variants", 2, 21, 9, 8)
    x, dy = (channels_last(shape, torch.float64) for shape in (pool.shape, pool.out))
    vectors = prologue(pool.c, torch.float64, affine)
    if affine and zero:
        vectors[2][:5] = 0  # all equal: the first counts
    arguments = (*pool.geometry, *vectors)
    y = OPS.max_pool2d(x, *arguments)
    torch.testing.assert_close(y, reference.max_pool2d(x, *arguments), rtol=1e-12, atol=1e-12)
    ours = OPS.max_pool2d_backward(dy, x, *arguments)
    theirs = reference.max_pool2d_backward(dy, x, *arguments)
    assert [v.shape == (0,) for v in ours] == [False] * 3 + [not affine] * 2
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_nan_and_infinity_pass_the_prologue() -> None:
    pool = Pool("nan", 1, 18, 9, 9)
    x = channels_last(pool.shape, torch.float32)
    x[0, 0, 2, 3], x[0, 17, 4, 4], x[0, 3, 8, 8] = float("nan"), float("inf"), -float("inf")
    vectors = prologue(pool.c, torch.float32)
    dy = channels_last(pool.out, torch.float32)
    y = OPS.max_pool2d(x, *pool.geometry, *vectors)
    want = reference.max_pool2d(x, *pool.geometry, *vectors)
    assert_same_bits(y.isnan(), want.isnan())
    assert_same_bits(y.isinf(), want.isinf())
    assert y.isnan().sum() == 2 and y.isinf().sum() == 2
    dx, *sums = OPS.max_pool2d_backward(dy, x, *pool.geometry, *vectors)
    want, *want_sums = reference.max_pool2d_backward(dy, x, *pool.geometry, *vectors)
    torch.testing.assert_close(dx, want)
    for got, sum_ in zip(sums, want_sums, strict=True):
        torch.testing.assert_close(got, sum_, equal_nan=True)


def test_gradient_through_the_statistics_is_batch_norms() -> None:
    pool = Pool("statistics", 4, 12, 9, 7)
    z = torch.randn(pool.shape, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 12, dtype=torch.float64)
    dy = torch.randn(pool.out, dtype=torch.float64)
    y = torch.relu(F.batch_norm(z, None, None, weight, bias, training=True, eps=EPS))
    (want,) = torch.autograd.grad(F.max_pool2d(y, *pool.geometry), z, dy)
    z = z.detach().requires_grad_()
    var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    y = OPS.max_pool2d(z, *pool.geometry, mean, var, weight, bias, EPS)
    (got,) = torch.autograd.grad(y, z, dy)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_over_many_rows_stay_exact(dtype: torch.dtype) -> None:
    pool = Pool("many", 16, 16, 160, 150)
    x, dy = channels_last(pool.shape, dtype), channels_last(pool.out, dtype) + 1
    vectors = prologue(pool.c, dtype)
    exact = (*(v.double() for v in vectors[:4]), EPS)
    ours = OPS.max_pool2d_backward(dy, x, *pool.geometry, *vectors)
    theirs = reference.max_pool2d_backward(dy, x, *pool.geometry, *vectors)
    truth = reference.max_pool2d_backward(dy.double(), x.double(), *pool.geometry, *exact)
    for name, a, b, c in zip(GRADIENTS, ours, theirs, truth, strict=True):
        assert_within_twice(a, b, c, name)


def layouts(x: Tensor) -> Iterator[Tensor]:
    """The values of `x` in every layout that an op may be given."""
    n, c, h, w = x.shape
    yield x.contiguous()
    wide = x.new_full((n, c + 3, h + 2, w + 1), float("nan"))
    wide = wide.contiguous(memory_format=torch.channels_last)
    wide[:, 2 : c + 2, 1 : h + 1, :w] = x
    yield wide[:, 2 : c + 2, 1 : h + 1, :w]
    yield wide[:, 2 : c + 2, 1 : h + 1, :w].flip(3).contiguous().flip(3)
    yield x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("with_prologue", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [19, 64])
def test_layouts_do_not_matter(channels: int, dtype: torch.dtype, with_prologue: bool) -> None:
    pool = Pool("layouts", 2, channels, 9, 11)
    x, dy = channels_last(pool.shape, dtype), channels_last(pool.out, dtype)
    arguments = (*pool.geometry, *(prologue(pool.c, dtype) if with_prologue else NONE))
    y = OPS.max_pool2d(x, *arguments)
    gradients = OPS.max_pool2d_backward(dy, x, *arguments)
    for other_x, other_dy in zip(layouts(x), layouts(dy), strict=True):
        result = OPS.max_pool2d(other_x, *arguments)
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert_same_bits(result, y)
        others = OPS.max_pool2d_backward(other_dy, other_x, *arguments)
        for got, want in zip(others, gradients, strict=True):
            assert_same_bits(got, want)


def test_expanded_gradient() -> None:
    pool = Pool("expanded", 2, 24, 9, 9)
    x = channels_last(pool.shape, torch.float32)
    dy = torch.ones(()).expand(pool.out)
    dx = OPS.max_pool2d_backward(dy, x, *pool.geometry, *NONE)[0]
    assert_same_bits(dx, torch_gradient(dy.contiguous(), x, pool))
    assert dx.sum() == dy.sum()


@pytest.mark.parametrize("pool", [p for p in POOLS if p.n] + [Pool("large", 3, 64, 112, 90)])
def test_same_bits_every_time_and_for_every_number_of_threads(pool: Pool) -> None:
    x, dy = (channels_last(shape, torch.float32) for shape in (pool.shape, pool.out))
    vectors = prologue(pool.c, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            found = [OPS.max_pool2d(x, *pool.geometry, *v) for v in (NONE, vectors)]
            for v in (NONE, vectors):
                found += OPS.max_pool2d_backward(dy, x, *pool.geometry, *v)
            results.append(found)
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        for got, want in zip(again, results[0], strict=True):
            assert_same_bits(got, want)


def test_streamed_results() -> None:
    """Large results in kept memory are written past the caches: the bits are the same."""
    pool = Pool("large", 3, 64, 122, 119)
    x, dy = (channels_last(shape, torch.float32) for shape in (pool.shape, pool.out))
    vectors = prologue(pool.c, torch.float32)

    def results() -> list[Tensor]:
        found = [OPS.max_pool2d(x, *pool.geometry, *v) for v in (NONE, vectors)]
        return found + [
            OPS.max_pool2d_backward(dy, x, *pool.geometry, *v)[0] for v in (NONE, vectors)
        ]

    before = _C.set_kept_memory_limit(256 << 20)
    try:
        streamed = results()
        _C.set_kept_memory_limit(0)
        plain = results()
    finally:
        _C.set_kept_memory_limit(before)
    for got, want in zip(streamed, plain, strict=True):
        assert_same_bits(got, want)
    assert_same_bits(plain[0], F.max_pool2d(x, *pool.geometry))


def _bad_arguments() -> Iterator[tuple[str, str, Callable[[], object]]]:
    x, dy, vector = torch.randn(2, 6, 8, 8), torch.randn(2, 6, 4, 4), torch.ones(6)
    three, two, one = [3, 3], [2, 2], [1, 1]
    forward, backward = OPS.max_pool2d, OPS.max_pool2d_backward
    geometry = (three, two, one)
    yield "max_pool2d", "input", lambda: forward(x[0], *geometry, *NONE)
    yield "max_pool2d", "input", lambda: forward(x.int(), *geometry, *NONE)
    yield "max_pool2d", "input", lambda: forward(x[..., :0], *geometry, *NONE)
    yield "max_pool2d", "input", lambda: forward(x, [11, 3], two, one, *NONE)
    yield "max_pool2d", "kernel_size", lambda: forward(x, [3], two, one, *NONE)
    yield "max_pool2d", "kernel_size", lambda: forward(x, [3, 0], two, one, *NONE)
    yield "max_pool2d", "stride", lambda: forward(x, three, [0, 1], one, *NONE)
    yield "max_pool2d", "stride", lambda: forward(x, three, [1, 1, 1], one, *NONE)
    yield "max_pool2d", "padding", lambda: forward(x, three, two, [-1, 0], *NONE)
    yield "max_pool2d", "padding", lambda: forward(x, three, two, [1, 2], *NONE)
    yield "max_pool2d", "in_var", lambda: forward(x, *geometry, vector, *NONE[1:])
    yield "max_pool2d", "in_mean", lambda: forward(x, *geometry, None, vector, *NONE[2:])
    yield "max_pool2d", "in_mean", lambda: forward(x, *geometry, None, None, vector, None, EPS)
    yield "max_pool2d", "in_mean", lambda: forward(x, *geometry, vector[:5], vector, *NONE[2:])
    yield "max_pool2d", "in_var", lambda: forward(x, *geometry, vector, vector.double(), *NONE[2:])
    yield (
        "max_pool2d",
        "in_bias",
        lambda: forward(x, *geometry, vector, vector, None, vector[:, None], EPS),
    )
    yield "max_pool2d_backward", "dy", lambda: backward(x, x, *geometry, *NONE)
    yield "max_pool2d_backward", "dy", lambda: backward(dy[0], x, *geometry, *NONE)
    yield "max_pool2d_backward", "dy", lambda: backward(dy.double(), x, *geometry, *NONE)
    yield "max_pool2d_backward", "input", lambda: backward(dy, x[0], *geometry, *NONE)
    yield "max_pool2d_backward", "padding", lambda: backward(dy, x, three, two, [2, 2], *NONE)
    yield (
        "max_pool2d_backward",
        "in_weight",
        lambda: backward(dy, x, *geometry, vector, vector, vector[:1], None, EPS),
    )


@pytest.mark.parametrize(("op", "argument", "call"), list(_bad_arguments()))
def test_bad_arguments_are_named(op: str, argument: str, call: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=rf"fastres::{op}: {argument} must be"):
        call()


@on_other_instruction_sets
def test_other_instruction_sets(isa: str) -> None:
    """The tests above, in a process of each other instruction set."""
    run_tests(__file__, "not many", isa)

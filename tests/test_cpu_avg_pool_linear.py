"""The CPU kernels of avg_pool_linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import HEADS, Head
from running import on_other_instruction_sets, run_tests
from tolerances import assert_within_twice

OP = torch.ops.fastres.avg_pool_linear
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAN, INF = float("nan"), float("inf")


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1), weight, bias)


def arguments(head: Head, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """What a ReLU leaves, a linear layer's weight as it is initialised, and a bias."""
    x = torch.randn(head.shape).relu().to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(head.outputs, head.c) / max(head.c, 1) ** 0.5
    return x, weight.to(dtype), torch.randn(head.outputs).to(dtype)


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_values_against_float64(head: Head, dtype: torch.dtype, with_bias: bool) -> None:
    x, weight, bias = arguments(head, dtype)
    given = (x, weight, bias if with_bias else None)
    exact = by_torch(*(None if t is None else t.double() for t in given))
    y = OP(*given)
    assert y.dtype == dtype and y.is_contiguous()
    assert_within_twice(y, by_torch(*given), exact)


def test_means_of_many_pixels_stay_exact() -> None:
    x, _, _ = arguments(Head("many-pixels", 1, 35, 160, 150, 35))
    x += 1  # Rounding errors of one running sum would pile up.
    given = (x, torch.eye(35), torch.zeros(35))
    exact = by_torch(*(t.double() for t in given))
    assert_within_twice(OP(*given), by_torch(*given), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", [h for h in HEADS if h.n and h.c * h.outputs < 2e5], ids=str)
def test_an_images_result_does_not_depend_on_the_others(head: Head, dtype: torch.dtype) -> None:
    x, weight, bias = arguments(Head("nine", 9, head.c, 3, 2, head.outputs), dtype)
    alone = torch.cat([OP(image[None], weight, bias) for image in x])
    for first, last in ((0, 9), (0, 2), (1, 4), (2, 6), (3, 8), (1, 9)):
        assert_same_bits(OP(x[first:last], weight, bias), alone[first:last])


@pytest.mark.parametrize("rows", range(1, 6))
def test_an_outputs_value_does_not_depend_on_the_others(rows: int) -> None:
    x, weight, bias = arguments(Head("rows", 5, 83, 2, 2, 9))
    whole = OP(x, weight, bias)
    assert_same_bits(OP(x, weight[2 : 2 + rows], bias[2 : 2 + rows]), whole[:, 2 : 2 + rows])


# Those that one thread would compute alone do not show much.
@pytest.mark.parametrize(
    "head",
    [
        Head("imagenet", 1, 2048, 7, 7, 1000),
        Head("odd", 7, 643, 5, 5, 1001),
        Head("few-outputs", 131, 517, 4, 4, 10),
        Head("large-picture", 1, 1025, 25, 31, 91),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time_and_for_every_number_of_threads(
    head: Head, dtype: torch.dtype
) -> None:
    given = arguments(head, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(OP(*given))
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert_same_bits(again, results[0])


def images(x: Tensor) -> Iterator[Tensor]:
    """The values of `x` in every layout that an op may be given."""
    n, c, h, w = x.shape
    yield x.contiguous()
    wide = x.new_full((n, c + 3, h + 2, w + 1), NAN).contiguous(memory_format=torch.channels_last)
    wide[:, 2 : c + 2, 1 : h + 1, :w] = x
    yield wide[:, 2 : c + 2, 1 : h + 1, :w]
    yield x.transpose(2, 3).contiguous().transpose(2, 3)


def parameters(weight: Tensor, bias: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    outputs, channels = weight.shape
    wide = weight.new_full((outputs, channels + 3), NAN)
    wide[:, 1 : channels + 1] = weight
    spaced = bias.new_full((outputs, 2), NAN)
    spaced[:, 1] = bias
    yield wide[:, 1 : channels + 1], spaced[:, 1]
    yield weight.t().contiguous().t(), bias
    # Rows that start at no multiple of a vector.
    shifted = weight.new_full((weight.numel() + 1,), NAN)
    shifted[1:] = weight.flatten()
    yield shifted[1:].view_as(weight), bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [19, 64])
def test_layouts_do_not_matter(channels: int, dtype: torch.dtype) -> None:
    x, weight, bias = arguments(Head("layouts", 3, channels, 5, 4, 11), dtype)
    expected = OP(x, weight, bias)
    for other in images(x):
        assert_same_bits(OP(other, weight, bias), expected)
    for others in parameters(weight, bias):
        assert_same_bits(OP(x, *others), expected)


def test_an_expanded_image_and_bias() -> None:
    _, weight, _ = arguments(Head("expanded", 2, 24, 3, 3, 7))
    x, bias = torch.full((), 2.0).expand(2, 24, 3, 3), torch.ones(()).expand(7)
    torch.testing.assert_close(OP(x, weight, bias), (2 * weight.sum(1) + 1).expand(2, 7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("channels", [5, 48])
def test_nan_and_infinity_reach_what_they_belong_to(
    value: float, channels: int, dtype: torch.dtype
) -> None:
    head = Head("special", 6, channels, 3, 3, 9)
    for place in ("input", "weight", "bias"):
        x, weight, bias = arguments(head, dtype)
        clean = OP(x, weight, bias)
        if place == "input":
            x[4, channels - 1, 2, 1] = value
            reached = (slice(4, 5), slice(None))
        elif place == "weight":
            weight[8, channels - 1] = value
            reached = (slice(None), slice(8, 9))
        else:
            bias[3] = value
            reached = (slice(None), slice(3, 4))
        y, want = OP(x, weight, bias), by_torch(x, weight, bias)
        assert_same_bits(y[reached], want[reached])
        assert not y[reached].isfinite().any(), place
        y[reached] = clean[reached]
        assert_same_bits(y, clean)


def test_infinities_of_both_signs_make_nan() -> None:
    x, weight, bias = arguments(Head("both", 1, 20, 4, 4, 3))
    x[0, 2, 0, 0], x[0, 2, 3, 3] = INF, -INF
    assert OP(x, weight, bias).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_left_of_the_call_before(dtype: torch.dtype) -> None:
    """Memory of the means that a call gives back is the next one's."""
    x, weight, bias = arguments(Head("next", 2, 10, 2, 2, 3), dtype)
    expected = by_torch(*(t.double() for t in (x, weight, bias))).to(dtype)
    OP(torch.full((2, 16, 2, 2), NAN, dtype=dtype), torch.ones(3, 16, dtype=dtype), None)
    torch.testing.assert_close(OP(x, weight, bias), expected)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(0, 5, 3, 3, 4), (2, 5, 3, 3, 0), (2, 0, 3, 3, 6), (2, 5, 0, 3, 6), (0, 5, 0, 0, 0)]
)
def test_empty_arguments_as_in_torch(shape: tuple[int, ...], with_bias: bool) -> None:
    x, weight, bias = arguments(Head("empty", *shape))
    given = (x, weight, bias if with_bias else None)
    assert_same_bits(OP(*given), by_torch(*given))


def test_16_bit_results_are_rounded_once() -> None:
    """Means whose rounding to bfloat16 would show: 1 + 2^-9 of 512 pixels."""
    x = torch.ones(1, 8, 16, 32, dtype=torch.bfloat16)
    x[:, :, 0, 0] = 2
    weight = torch.zeros(1, 8, dtype=torch.bfloat16)
    weight[0, 0], bias = 1, torch.full((1,), -1.0, dtype=torch.bfloat16)
    assert OP(x, weight, bias).item() == 2.0**-9


def _bad_arguments() -> Iterator[tuple[str, Callable[[], object]]]:
    x, weight, bias = torch.randn(2, 6, 4, 4), torch.randn(5, 6), torch.randn(5)
    yield "input", lambda: OP(x[0], weight, bias)
    yield "input", lambda: OP(x.int(), weight.int(), bias.int())
    yield "weight", lambda: OP(x, weight[:, :5], bias)
    yield "weight", lambda: OP(x, weight[0], bias)
    yield "weight", lambda: OP(x, weight[..., None], bias)
    yield "weight", lambda: OP(x, weight.double(), bias)
    yield "weight", lambda: OP(x.bfloat16(), weight, bias)
    yield "bias", lambda: OP(x, weight, bias[:4])
    yield "bias", lambda: OP(x, weight, bias[:1])
    yield "bias", lambda: OP(x, weight, bias[0])
    yield "bias", lambda: OP(x, weight, bias[:, None])
    yield "bias", lambda: OP(x.half(), weight.half(), bias)


@pytest.mark.parametrize(("argument", "call"), list(_bad_arguments()))
def test_bad_arguments_are_named(argument: str, call: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=rf"fastres::avg_pool_linear: {argument} must be"):
        call()


@on_other_instruction_sets
def test_other_instruction_sets(isa: str) -> None:
    """The tests above, in a process of each other instruction set."""
    run_tests(__file__, "not imagenet", isa)

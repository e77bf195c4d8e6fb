"""The CPU kernels of conv_bn_relu, conv_stats and pack_conv_weight, each algorithm and ISA."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from algorithms import AMX, DIGITS
from torch import Tensor

from cases import ODD_CONVS, RESNET_CONVS, Conv
from fastres import _C
from fastres.ops import conv_bn_relu, conv_stats, pack_conv_weight, reference
from running import on_other_instruction_sets, run_tests
from tolerances import assert_within_twice, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# By what they are: on small pictures much of the two families is the same.
SMALL_RESNET_CONVS = tuple(
    {
        replace(case, name=""): case
        for case in (c.at(min(c.size, 30 if c.kernel == 7 else 14)) for c in RESNET_CONVS)
    }.values()
)
ODD_STEMS = (
    Conv("stem-cut-tiles", 4, 48, 7, 2, 43, n=3),
    Conv("stem-one-pixel", 1, 16, 7, 2, 1, n=2),
)
WINOGRAD = ("winograd4", "winograd2")
ALGORITHMS = (*WINOGRAD, "amx", "packed", "aten")  # but digits: test_cpu_digits.py


def on_every_algorithm(cases: Sequence[Conv]) -> pytest.MarkDecorator:
    """Each case with each algorithm; with Winograd's where they can compute it.

    Where they can't, naming one is naming the direct algorithm, which is there already.
    """
    pairs = [(c, a) for c in cases for a in ALGORITHMS if a in c.winograd or a not in WINOGRAD]
    return pytest.mark.parametrize(("case", "algorithm"), pairs, ids=str, indirect=["algorithm"])


@pytest.fixture(params=ALGORITHMS)
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "amx" and _C.cpu_capability() != "amx":
        pytest.skip("AMX is not in use")
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", request.param)
    return request.param


@pytest.fixture
def packed_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", "packed")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN, so that an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


class Problem:
    """The arguments of both ops for one convolution; V's in the parameter dtype."""

    def __init__(self, case: Conv, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.case, self.dtype = case, dtype
        exact_algorithm = os.environ.get("FASTRES_CPU_ALGORITHM") in (
            "winograd2",
            "amx",
            "packed",
            "aten",
        )
        self.factor = 2.0 if exact_algorithm else case.factor
        self.geometry = ([case.stride] * 2, [case.padding] * 2, [1, 1])
        fan_in = case.c_in * case.kernel**2
        self.input = self.images(normal(case.n, case.c_in, case.size, case.size))
        weight = normal(case.c_out, case.c_in, case.kernel, case.kernel) * (2 / fan_in) ** 0.5
        self.weight = weight.to(dtype)
        vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.bias, self.mean, self.bn_weight, self.bn_bias = normal(4, case.c_out).to(vector_dtype)
        self.var = normal(case.c_out).square().add(0.5).to(vector_dtype)
        self.in_mean, self.in_weight, self.in_bias = normal(3, case.c_in).to(vector_dtype)
        self.in_var = normal(case.c_in).square().add(0.5).to(vector_dtype)
        self.residual = self.images(normal(case.n, case.c_out, case.out, case.out))

    def images(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def inference(self, op: Callable[..., Tensor], convert: Callable, residual: bool, **kwargs):
        args = [self.input, self.weight, self.bias, self.mean, self.var, self.bn_weight]
        args.append(self.bn_bias)
        converted = [convert(x) for x in args]
        shortcut = convert(self.residual) if residual else None
        kwargs.setdefault("packed", None)
        return op(*converted, 1e-5, shortcut, *self.geometry, 1, kwargs.pop("relu", True), **kwargs)

    def training(self, op: Callable[..., tuple], convert: Callable, prologue: bool):
        vectors = [self.in_mean, self.in_var, self.in_weight, self.in_bias]
        converted = [convert(x) if prologue else None for x in vectors]
        return op(convert(self.input), convert(self.weight), *converted, 1e-5, *self.geometry, 1)


def same(x: Tensor) -> Tensor:
    return x


def double(x: Tensor) -> Tensor:
    return x.double()


@lru_cache(maxsize=64)  # the same for all algorithms
def inference_results(case: Conv, dtype: torch.dtype, residual: bool, relu: bool) -> list[Tensor]:
    """The exact result, and torch's."""
    problem = Problem(case, dtype)
    return [
        problem.inference(reference.conv_bn_relu, convert, residual, relu=relu)
        for convert in (double, same)
    ]


@lru_cache(maxsize=64)
def training_results(case: Conv, dtype: torch.dtype, prologue: bool) -> list[tuple[Tensor, ...]]:
    """The exact results, and torch's."""
    problem = Problem(case, dtype)
    return [problem.training(reference.conv_stats, convert, prologue) for convert in (double, same)]


def check_inference(problem: Problem, residual: bool, relu: bool = True) -> None:
    actual = problem.inference(conv_bn_relu, same, residual, relu=relu)
    exact, theirs = inference_results(problem.case, problem.dtype, residual, relu)
    assert actual.dtype == problem.dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_within_twice(actual, theirs, exact, "conv_bn_relu", problem.factor)


def check_training(problem: Problem, prologue: bool) -> None:
    actual = problem.training(conv_stats, same, prologue)
    exact, theirs = training_results(problem.case, problem.dtype, prologue)
    assert actual[0].dtype == problem.dtype
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    assert_within_twice(actual[0], theirs[0], exact[0], "z", problem.factor)
    assert_within_twice(actual[2], theirs[2], exact[2], "var", problem.factor)
    # A mean near zero is a difference of large numbers: judge it beside the deviation.
    size = (exact[1].square() + exact[2]).sqrt().norm()
    ours_error, their_error = ((m[1].double() - exact[1]).norm() for m in (actual, theirs))
    # Torch's error of a single number may be next to none by chance, not so what it is expected to
    # be when every product's factors are rounded.
    pixels = problem.case.n * problem.case.out**2
    chance = torch.finfo(problem.dtype).eps / 4 / pixels**0.5 if problem.case.c_out == 1 else 0.0
    assert ours_error <= problem.factor * their_error + max(2e-7, chance) * size


@on_every_algorithm(SMALL_RESNET_CONVS)
def test_resnet_shapes(case: Conv, algorithm: str) -> None:
    problem = Problem(case.batch(2), torch.float32)
    check_inference(problem, residual=True)
    check_training(problem, prologue=case.c_in > 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_algorithm((*ODD_CONVS, *ODD_STEMS))
def test_odd_shapes(case: Conv, dtype: torch.dtype, algorithm: str, threads: int) -> None:
    problem = Problem(case, dtype)
    for flag in (False, True):
        check_inference(problem, residual=flag, relu=flag)
        check_training(problem, prologue=flag)


@pytest.mark.parametrize("case", ODD_CONVS, ids=str)
def test_odd_shapes_in_float64(case: Conv) -> None:
    problem = Problem(case, torch.float64)
    for flag in (False, True):
        check_inference(problem, residual=flag, relu=flag)
        check_training(problem, prologue=flag)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_every_algorithm(SMALL_RESNET_CONVS[::3])
def test_resnet_shapes_in_16_bit(case: Conv, dtype: torch.dtype, algorithm: str) -> None:
    problem = Problem(case, dtype)
    check_inference(problem, residual=True)
    check_training(problem, prologue=True)


@pytest.mark.parametrize("case", [RESNET_CONVS[0].at(90), *RESNET_CONVS[2:8]], ids=str)
def test_pictures_cut_into_blocks(case: Conv, packed_algorithm: None, threads: int) -> None:
    problem = Problem(case, torch.float32)
    check_inference(problem, residual=True)
    check_training(problem, prologue=True)


@pytest.mark.parametrize("kernel", [(1, 3), (3, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("stride", [(1, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (2, 1), (0, 3)], ids=str)
def test_uneven_geometry(kernel, stride, padding, packed_algorithm: None) -> None:
    input, weight = torch.randn(2, 20, 9, 1500), torch.randn(18, 20, *kernel)
    z, mean, _ = conv_stats(
        input, weight, None, None, None, None, 0.0, list(stride), list(padding), [1, 1]
    )
    exact = F.conv2d(input.double(), weight.double(), None, stride, padding)
    assert relative_error(z, exact) < 1e-6
    assert (mean - exact.mean((0, 2, 3))).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [(1, 2, 2, 1), (2, 1, 1, 4), (1, 1, 1, 16)],
)
def test_groups_and_dilation(stride: int, padding: int, dilation: int, groups: int) -> None:
    input, weight = torch.randn(2, 16, 9, 9), torch.randn(32, 16 // groups, 3, 3)
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    assert pack_conv_weight(weight, *geometry).shape == (0,)
    for a, e in zip(
        conv_stats(input, weight, None, None, None, None, 0.0, *geometry),
        reference.conv_stats(
            input.double(), weight.double(), None, None, None, None, 0.0, *geometry
        ),
        strict=True,
    ):
        assert relative_error(a, e) < 1e-6


@pytest.mark.parametrize("kernel_height", [1, 4, 7])
@pytest.mark.parametrize("stride_height", [1, 2, 3])
@pytest.mark.parametrize("padding", [(0, 0), (3, 3), (1, 6), (8, 9)], ids=str)
def test_winograd_on_uneven_stems(
    kernel_height: int, stride_height: int, padding: tuple[int, int], threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Lines so long that several blocks share them, too."""
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", "winograd4")
    stride, weight = (stride_height, 2), torch.randn(48, 3, kernel_height, 7)
    for size in ((2, 9, 7), (1, 11, 283)):
        input = torch.randn(size[0], 3, *size[1:])
        geometry = (list(stride), list(padding), [1, 1])
        z, mean, _ = conv_stats(input, weight, None, None, None, None, 0.0, *geometry)
        exact = F.conv2d(input.double(), weight.double(), None, stride, padding)
        assert relative_error(z, exact) < 1e-6
        assert (mean - exact.mean((0, 2, 3))).abs().max() < 1e-4


def sliced(x: Tensor) -> Tensor:
    """x as a slice of a larger channels_last tensor, full of NaN around it."""
    n, c, h, w = x.shape
    large = torch.full((n + 1, c + 8, h + 3, w + 2), float("nan"), dtype=x.dtype)
    part = large.contiguous(memory_format=torch.channels_last)[1:, 4 : 4 + c, 2 : 2 + h, 1 : 1 + w]
    return part.copy_(x)


LAYOUTS = {
    "sliced": sliced,
    "channels_first": torch.Tensor.contiguous,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda x: torch.stack([x, x], -1).flatten(3)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [*ODD_CONVS[3:6], RESNET_CONVS[2].at(9)], ids=str)
def test_layouts(case: Conv, layout: str, algorithm: str) -> None:
    problem = Problem(case, torch.float32)
    change = LAYOUTS[layout]
    dense = problem.inference(conv_bn_relu, same, True), *problem.training(conv_stats, same, True)
    problem.input, problem.residual = change(problem.input), change(problem.residual)
    problem.weight = problem.weight.contiguous(memory_format=torch.channels_last)
    problem.mean = torch.stack([problem.mean, problem.mean], 1)[:, 0]
    again = problem.inference(conv_bn_relu, same, True), *problem.training(conv_stats, same, True)
    for a, b in zip(again, dense, strict=True):
        assert a.is_contiguous(memory_format=torch.channels_last) or a.dim() == 1
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", [*ODD_CONVS, *ODD_STEMS, *SMALL_RESNET_CONVS[::6]], ids=str)
def test_packed_weight(case: Conv, algorithm: str) -> None:
    problem = Problem(case, torch.float32)
    size = [case.n, case.size, case.size]
    packed = pack_conv_weight(problem.weight, *problem.geometry, 1, size)
    channels_last = problem.weight.contiguous(memory_format=torch.channels_last)
    assert pack_conv_weight(channels_last, *problem.geometry, 1, size).equal(packed)
    expected = problem.inference(conv_bn_relu, same, False)
    for given in (packed, packed.new_empty(0), packed[:-1]):
        result = problem.inference(conv_bn_relu, same, False, packed=given)
        assert result.equal(expected)


def test_packed_order(packed_algorithm: None) -> None:
    weight = torch.randn(33, 5, 3, 2)
    padded = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, 15))
    panels = padded.view(3, 16, 5, 3, 2).permute(0, 3, 4, 2, 1)
    assert pack_conv_weight(weight, [1, 1], [1, 1], [1, 1]).equal(panels.reshape(-1))


@pytest.mark.parametrize("form", ["winograd4", "winograd2", DIGITS, AMX, "packed"])
@pytest.mark.parametrize(("c_in", "kernel", "stride"), [(32, 3, 1), (32, 3, 2), (3, 7, 2)])
def test_every_form_serves_every_size(
    c_in: int, kernel: int, stride: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(32, c_in, kernel, kernel)
    geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1], 1)
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", form)
    packed = pack_conv_weight(weight, *geometry)
    monkeypatch.delenv("FASTRES_CPU_ALGORITHM")
    zeros, ones = torch.zeros(32), torch.ones(32)
    for n, h, w in ((1, 1, 1), (2, 4, 9), (40, 7, 7)):
        x = torch.randn(n, c_in, h, w)
        y = conv_bn_relu(x, weight, None, zeros, ones, None, None, 0.0, None, *geometry, False,
                         packed)  # fmt: skip
        assert relative_error(y, F.conv2d(x.double(), weight.double(), None, *geometry[:2])) < 3e-6


@pytest.mark.parametrize(
    ("c_in", "c_out"), [(64, 64), (48, 80), (16, 96), (32, 112), (128, 144), (144, 112)]
)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("tile", ["winograd4", "winograd2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_winograd_tiles(
    dtype: torch.dtype, tile: str, stride: int, c_in: int, c_out: int, threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """So many that the matrix unit multiplies them, where there is one: 16 at a time, or 32 where
    the kernels are many.
    """
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", tile)
    problem = Problem(Conv("many", c_in, c_out, 3, stride, 23, n=9), dtype)
    check_inference(problem, True)
    check_training(problem, True)
    check_training(problem, False)


@pytest.mark.parametrize("algorithm", [AMX])
@pytest.mark.parametrize("size", range(3, 11))
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_matrix_tiles(
    dtype: torch.dtype, stride: int, size: int, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one tile of pixels to eight, of which the first split the weights for the others."""
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", algorithm)
    problem = Problem(Conv("tiles", 70, 80, 3, stride, size * stride), dtype)
    check_inference(problem, True)
    check_training(problem, True)


@pytest.mark.parametrize("algorithm", [AMX])
def test_narrow_images_in_blocks_of_unequal_size(
    algorithm: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs of one column, with a stride: the larger block's window may be by columns, and then
    takes less than the smaller one's.
    """
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", algorithm)
    x, weight = torch.randn(33, 320, 5, 1), torch.randn(32, 320, 3, 3)
    z, _, _ = conv_stats(x, weight, None, None, None, None, 0.0, [2, 2], [1, 1], [1, 1], 1)
    assert relative_error(z, F.conv2d(x.double(), weight.double(), None, 2, 1)) < 3e-6


@pytest.mark.parametrize("algorithm", [AMX])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1), (2, 3, 0), (5, 2, 4)]
)
@pytest.mark.parametrize(("n", "out"), [(1, (7, 7)), (33, (1, 1)), (17, (1, 1)), (1, (3, 11))])
def test_one_pixel_more_than_whole_matrix_tiles(
    n: int, out: tuple[int, int], kernel: int, stride: int, padding: int, algorithm: str,
    threads: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It is added up beside the matrix unit."""
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", algorithm)
    size = [(pixels - 1) * stride + kernel - 2 * padding for pixels in out]
    if min(size) < 1:
        pytest.skip("there is no such input")
    x, weight = torch.randn(n, 72, *size), torch.randn(40, 72, kernel, kernel)
    vectors, shortcut = torch.rand(4, 40) + 0.5, torch.randn(n, 40, *out)
    geometry = ([stride] * 2, [padding] * 2, [1, 1], 1)
    args = (x, weight, None, *vectors)
    for residual in (None, shortcut):
        y = conv_bn_relu(*args, 1e-5, residual, *geometry, False, None)
        exact = reference.conv_bn_relu(
            *(None if a is None else a.double() for a in args),
            1e-5, None if residual is None else residual.double(), *geometry, False, None,
        )  # fmt: skip
        assert relative_error(y, exact) < 6e-7
        assert (y - exact)[-1, :, -1, -1].norm() < 6e-7 * exact[-1, :, -1, -1].norm()
    z, mean, var = conv_stats(x, weight, *vectors[:, :1].expand(4, 72), 1e-5, *geometry)
    exact_z, exact_mean, exact_var = reference.conv_stats(
        x.double(), weight.double(), *vectors[:, :1].expand(4, 72).double(), 1e-5, *geometry
    )
    assert relative_error(z, exact_z) < 6e-7
    assert (mean - exact_mean).norm() < 1e-6 * exact_z.norm()
    assert relative_error(var, exact_var) < 1e-6
    x[-1, 5, -1, -1] = float("nan")
    y = conv_bn_relu(*args, 1e-5, None, *geometry, False, None)
    nan = F.conv2d(x, weight, None, *geometry[:2]).isnan()
    assert nan.any() and y.isnan().equal(nan)


def test_input_size_of_packing() -> None:
    weight = torch.randn(32, 32, 3, 3)
    for size in ([1, 2], [1, -1, 3]):
        with pytest.raises(RuntimeError, match="pack_conv_weight: input_size must be empty or"):
            pack_conv_weight(weight, [1, 1], [1, 1], [1, 1], 1, size)


def test_statistics_of_a_large_mean(algorithm: str) -> None:
    input = torch.randn(4, 64, 14, 14).contiguous(memory_format=torch.channels_last)
    input[:, 0] += 1000.0
    weight = torch.eye(64)[:, :, None, None].clone()
    weight[:, 0] = 1.0
    exact = F.conv2d(input.double(), weight.double())
    z, mean, var = conv_stats(input, weight, None, None, None, None, 0.0, [1, 1], [0, 0], [1, 1])
    assert relative_error(mean, exact.mean((0, 2, 3))) < 1e-7
    assert relative_error(var, z.double().var((0, 2, 3), correction=0)) < 1e-5


def test_statistics_do_not_change_from_run_to_run(packed_algorithm: None, threads: int) -> None:
    problem = Problem(RESNET_CONVS[2].batch(3), torch.float32)
    first = problem.training(conv_stats, same, True)
    for _ in range(3):
        for a, b in zip(problem.training(conv_stats, same, True), first, strict=True):
            assert a.equal(b)


@pytest.mark.parametrize(
    ("kernel", "stride", "c_in", "n"),
    [
        (1, 1, 16, 3),
        (3, 1, 16, 3),
        (3, 1, 16, 30),
        (3, 2, 16, 3),
        (3, 2, 16, 30),
        (5, 1, 4, 3),
        (7, 2, 4, 3),
    ],
)
def test_nan_and_infinity(kernel: int, stride: int, c_in: int, n: int, algorithm: str) -> None:
    """As in torch, also in the pixels beside: Winograd's tiles must not spread them."""
    problem = Problem(Conv("nan", c_in, 16, kernel, stride, 9, n=n), torch.float32)
    problem.input[0, 3, 1, 2] = float("nan")
    problem.input[1, 2, 0, 0] = float("inf")
    h, w = 1 // stride, 2 // stride
    actual = problem.inference(conv_bn_relu, same, False)
    expected = problem.inference(reference.conv_bn_relu, same, False)
    assert actual[0, :, h, w].isnan().all()
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
    z, mean, var = problem.training(conv_stats, same, False)
    expected_z = problem.training(reference.conv_stats, same, False)[0]
    torch.testing.assert_close(z, expected_z, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert mean.isnan().all() and var.isnan().all()
    a = problem.training(conv_stats, same, True)[0]
    assert a[0, :, h, w].isnan().all() and not a[2].isnan().any()


def test_packed_weight_of_bfloat16(algorithm: str) -> None:
    """In a form of its own where the matrix unit takes it, and only there."""
    problem = Problem(Conv("bfloat16", 48, 40, 3, 1, 12, n=3), torch.bfloat16)
    packed = pack_conv_weight(problem.weight, *problem.geometry, 1, [3, 12, 12])
    assert (packed.numel() > 0) == (algorithm == "amx")
    expected = problem.inference(conv_bn_relu, same, True)
    float_form = pack_conv_weight(problem.weight.float(), *problem.geometry, 1, [3, 12, 12])
    for given in (packed, float_form, packed[:-1]):
        assert problem.inference(conv_bn_relu, same, True, packed=given).equal(expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_in_bfloat16(value: float, algorithm: str) -> None:
    problem = Problem(Conv("bfloat16", 32, 32, 3, 1, 12, n=3), torch.bfloat16)
    problem.input[1, 5, 4, 7] = value
    for prologue in (False, True):
        z, mean, var = problem.training(conv_stats, same, prologue)
        exact = problem.training(reference.conv_stats, double, prologue)
        assert z.isfinite().equal(exact[0].isfinite())
        assert z.isnan().equal(exact[0].isnan())
        assert mean.isfinite().equal(exact[1].isfinite())
        assert var.isfinite().equal(exact[2].isfinite())
    actual = problem.inference(conv_bn_relu, same, True)
    exact_result = problem.inference(reference.conv_bn_relu, double, True)
    assert actual.isnan().equal(exact_result.isnan())


@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7F800001, -0x7FFFFF])
@pytest.mark.parametrize("where", ["input", "weight"])
def test_nan_of_every_payload(where: str, bits: int, algorithm: str) -> None:
    """Rounding must not carry a NaN's bits over into a number's."""
    problem = Problem(Conv("nan", 16, 16, 3, 1, 9, n=3), torch.float32)
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert nan.isnan().all()
    place = problem.input[:1, 3, 1, 2] if where == "input" else problem.weight[3, 2, 1, 1:2]
    place.copy_(nan)
    actual = problem.inference(conv_bn_relu, same, False)
    expected = problem.inference(reference.conv_bn_relu, same, False)
    assert expected.isnan().any()
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 70])
@pytest.mark.parametrize("tile", ["winograd4", "winograd2"])
@pytest.mark.parametrize(("c_in", "kernel", "stride"), [(16, 3, 1), (16, 3, 2), (3, 7, 2)])
def test_products_that_overflow_in_winograds_positions(
    c_in: int, kernel: int, stride: int, tile: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", tile)
    problem = Problem(Conv("large", c_in, 16, kernel, stride, 8, n=n), torch.float32)
    problem.input *= 2e37
    z = problem.training(conv_stats, same, False)[0]
    assert z.isfinite().all()
    exact = F.conv2d(problem.input.double(), problem.weight.double(), None, *problem.geometry[:2])
    assert relative_error(z, exact) < 2e-6


@pytest.mark.parametrize("name", ["winograd2", AMX, "packed"])
def test_errors_have_no_sign(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would add up from layer to layer."""
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", name)
    input = (torch.rand(6, 64, 14, 14) + 1).contiguous(memory_format=torch.channels_last)
    weight = torch.rand(32, 64, 3, 3) + 1
    exact = F.conv2d(input.double(), weight.double(), padding=1)
    z = conv_stats(input, weight, None, None, None, None, 0.0, [1, 1], [1, 1], [1, 1])[0]
    assert abs(float(((z.double() - exact) / exact).mean())) < 1e-8


def test_empty_batch(algorithm: str) -> None:
    problem = Problem(Conv("empty", 8, 16, 3, 1, 8, n=0), torch.float32)
    assert problem.inference(conv_bn_relu, same, True).shape == (0, 16, 8, 8)
    z, mean, var = problem.training(conv_stats, same, True)
    assert z.shape == (0, 16, 8, 8)
    assert mean.equal(torch.zeros(16)) and var.equal(torch.zeros(16))


def bad_calls() -> dict[str, tuple[str, Callable[[Problem], object]]]:
    def infer(**changes):
        def call(p: Problem):
            for name, change in changes.items():
                setattr(p, name, change(getattr(p, name)))
            return p.inference(torch.ops.fastres.conv_bn_relu, same, True)

        return call

    def train(p: Problem, **changes):
        args = {"in_mean": None, "in_var": None, "in_weight": None, "in_bias": None} | changes
        return torch.ops.fastres.conv_stats(p.input, p.weight, *args.values(), 1e-5, *p.geometry, 1)

    return {
        "rank of input": ("conv_bn_relu: input", infer(input=lambda x: x[0])),
        "rank of weight": ("conv_bn_relu: weight", infer(weight=lambda x: x[0])),
        "channels": ("conv_bn_relu: weight", infer(weight=lambda x: x[:, 1:])),
        "dtype of weight": ("conv_bn_relu: weight", infer(weight=torch.Tensor.double)),
        "integers": ("conv_bn_relu: input", infer(input=torch.Tensor.int)),
        "device": ("weight", infer(weight=lambda x: x.to("meta"))),
        "length of mean": ("conv_bn_relu: running_mean", infer(mean=lambda x: x[1:])),
        "dtype of var": ("conv_bn_relu: running_var", infer(var=torch.Tensor.double)),
        "bias": ("conv_bn_relu: bias", infer(bias=lambda x: x[:, None])),
        "bn_weight": ("conv_bn_relu: bn_weight", infer(bn_weight=lambda x: x[:2])),
        "residual": ("conv_bn_relu: residual", infer(residual=lambda x: x[:, :, 1:])),
        "stride": ("conv_bn_relu: stride", infer(geometry=lambda g: ([0, 1], *g[1:]))),
        "padding": ("conv_bn_relu: padding", infer(geometry=lambda g: (g[0], [-1, 0], g[2]))),
        "dilation": ("conv_bn_relu: dilation", infer(geometry=lambda g: (*g[:2], [1]))),
        "huge": ("conv_bn_relu: padding", infer(geometry=lambda g: (g[0], [2**62] * 2, g[2]))),
        "too small": (
            "conv_bn_relu: input",
            infer(input=lambda x: x[:, :, :1], geometry=lambda g: (g[0], [0, 0], g[2])),
        ),
        "packed": (
            "conv_bn_relu: packed",
            lambda p: p.inference(conv_bn_relu, same, False, packed=torch.zeros(3, 2)),
        ),
        "no in_var": ("conv_stats: in_var", lambda p: train(p, in_mean=p.in_mean)),
        "no in_mean": ("conv_stats: in_mean", lambda p: train(p, in_weight=p.in_mean)),
        "in_mean": (
            "conv_stats: in_mean",
            lambda p: train(p, in_mean=p.in_mean[1:], in_var=p.in_var),
        ),
        "groups of weight": (
            "pack_conv_weight: groups",
            lambda p: pack_conv_weight(p.weight, *p.geometry, 0),
        ),
        "rank of packed weight": (
            "pack_conv_weight: weight",
            lambda p: pack_conv_weight(p.weight[0], *p.geometry),
        ),
    }


@pytest.mark.parametrize("what", bad_calls())
def test_bad_arguments(what: str) -> None:
    message, call = bad_calls()[what]
    with pytest.raises(RuntimeError, match=message):
        call(Problem(Conv("small", 6, 18, 3, 1, 5), torch.float32))


def test_unknown_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", "fastest")
    with pytest.raises(RuntimeError, match="FASTRES_CPU_ALGORITHM must be"):
        check_inference(Problem(ODD_CONVS[1], torch.float32), residual=False)


@on_other_instruction_sets
def test_other_instruction_sets(isa: str) -> None:
    """The tests above on few shapes, in a process of each other instruction set."""
    some = "uneven or (packed or winograd) and (odd or nan or large_mean or layouts or every_form)"
    run_tests(__file__, some, isa)

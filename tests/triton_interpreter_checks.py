"""What test_triton_interpreter.py runs with TRITON_INTERPRET=1: launchers on CPU tensors.

Every tensor that a launcher allocates lies between guard bands and starts as NaN, so that a write
out of bounds and an element that nobody wrote both show; so do the inputs, for reads.
"""

import functools
import importlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import POOLS, Pool
from fastres import kernels, tune

GUARD = 4096
EPS = 1e-5
choice = importlib.import_module("fastres.kernels.choice")
tiles = importlib.import_module("fastres.kernels._tiles")
conv_module = importlib.import_module("fastres.kernels.conv")
launch_module = importlib.import_module("fastres.kernels._launch")
backward_module = importlib.import_module("fastres.kernels.conv_backward")
gradients_module = importlib.import_module("fastres.kernels.conv_gradients")
stats_module = importlib.import_module("fastres.kernels.channel_stats")

# Relative to the largest element of the exact result.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.float16: 3e-3}
DTYPES = [torch.float32, torch.float16, torch.float64]


def fill_of(tensor: Tensor) -> float:
    """What no kernel writes: NaN, in integers (a pool's taps) a number that is no tap."""
    return math.nan if tensor.is_floating_point() else 251


def is_filled(values: Tensor) -> Tensor:
    return values.isnan() if values.is_floating_point() else values == fill_of(values)


def guarded(source: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of a dense tensor between bands, and the buffer that holds both."""
    buffer = source.new_full((source.numel() + 2 * GUARD,), fill_of(source))
    inside = buffer.as_strided(source.shape, source.stride(), GUARD)
    return inside.copy_(source), buffer


class Guards:
    """Replaces torch's allocators and holds every buffer that a launcher gets from them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.buffers: list[Tensor] = []
        self.may_hold_nan = False
        patch.setattr(torch, "empty", self.wrap(torch.empty))
        patch.setattr(torch, "empty_like", self.wrap(torch.empty_like))
        patch.setattr(Tensor, "new_empty", self.wrap(Tensor.new_empty))

    def wrap(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(allocate)
        def guarded_allocate(*args: object, **kwargs: object) -> Tensor:
            plain = allocate(*args, **kwargs)
            inside, buffer = guarded(plain)
            self.buffers.append(buffer)
            return inside.fill_(fill_of(plain))

        return guarded_allocate

    def check(self) -> None:
        assert self.buffers
        for buffer in self.buffers:
            assert is_filled(buffer[:GUARD]).all(), "written before the tensor"
            assert is_filled(buffer[-GUARD:]).all(), "written past the tensor"
            if not self.may_hold_nan:
                assert not is_filled(buffer[GUARD:-GUARD]).any(), "an element was not written"


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guards]:
    torch.manual_seed(0)
    found = Guards(monkeypatch)
    yield found
    found.check()


def activation(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape).to(memory_format=torch.channels_last).to(dtype)
    return guarded(values)[0]


def vector(channels: int, dtype: torch.dtype, low: float = -1.0) -> Tensor:
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return guarded(torch.rand(channels, dtype=dtype) * 2 + low)[0]


def affine_vectors(channels: int, dtype: torch.dtype) -> list[Tensor]:
    """mean, var, weight, bias."""
    mean, weight, bias = (vector(channels, dtype) for _ in range(3))
    return [mean, vector(channels, dtype, low=0.5), weight, bias]


def exact(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def bn(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = (x - mean[:, None, None]) / torch.sqrt(var + EPS)[:, None, None]
    y = y if weight is None else y * weight[:, None, None]
    return y if bias is None else y + bias[:, None, None]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    assert actual.shape == expected.shape, what
    if actual.numel():
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
        assert error <= tolerance, f"{what}: {error:.2e} > {tolerance:.0e}"


def assert_channels_last(tensor: Tensor, dtype: torch.dtype) -> None:
    assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert tensor.dtype == dtype


def gradients(outputs: list[Tensor], inputs: list[Tensor], seeds: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, inputs, [seed.double() for seed in seeds]))


# N, C, H, W: ResNet's channel counts on small maps, then odd ones.
MAPS = [(2, 64, 5, 5), (2, 128, 4, 4), (3, 3, 9, 7), (1, 63, 1, 1), (2, 80, 13, 5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_elementwise_add_relu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, r, dy = (activation(shape, dtype) for _ in range(3))
    y = kernels.add_relu(x, r)
    assert_channels_last(y, dtype)
    assert_close(y, F.relu(x.double() + r.double()), TOLERANCE[dtype])
    torch.testing.assert_close(kernels.add_relu_backward(dy, y), dy.masked_fill(y <= 0, 0))


def test_elementwise_add_relu_passes_nan(guards: Guards) -> None:
    guards.may_hold_nan = True
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-42]).reshape(1, 5, 1, 1)
    y = kernels.add_relu(x, torch.zeros_like(x) - 0.0)
    expected = F.relu(x - 0.0)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=0)
    dinput = kernels.add_relu_backward(torch.ones_like(y), y)
    torch.testing.assert_close(dinput.flatten(), torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0]))


@pytest.mark.parametrize("residual", ["none", "plain", "projection"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_elementwise_bn_add_relu(
    shape: tuple[int, ...], dtype: torch.dtype, relu: bool, residual: str
) -> None:
    channels = shape[1]
    z, dy = activation(shape, dtype), activation(shape, dtype)
    main = affine_vectors(channels, dtype)
    r = None if residual == "none" else activation(shape, dtype)
    branch = affine_vectors(channels, dtype) if residual == "projection" else [None] * 4

    y = kernels.bn_add_relu(z, *main, EPS, r, *branch, EPS, relu)
    assert_channels_last(y, dtype)
    inputs = [exact(t) for t in (z, *main, r, *branch)]
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    expected = bn(*inputs[:5])
    if r is not None:
        expected = expected + (bn(*inputs[5:]) if residual == "projection" else inputs[5])
    if relu:
        # The mask of the rounded result, which is what the backward is given.
        expected_y = F.relu(expected)
        expected = expected * ~(y <= 0)
    else:
        expected_y = expected
    assert_close(y, expected_y.detach(), TOLERANCE[dtype])

    main_forward, branch_forward = main[:3], branch[:3]
    got = kernels.bn_add_relu_backward(dy, y, z, *main_forward, EPS, r, *branch_forward, EPS, relu)
    branch_names = ["dresidual", "dresidual_mean", "dresidual_var"]
    names = ["dz", "dmean", "dvar", "dweight", "dbias", *branch_names]
    names += ["dresidual_weight", "dresidual_bias"]
    want = gradients([expected], leaves, [dy])
    assert_channels_last(got[0], dtype)
    for name, actual, source in zip(names, got, inputs, strict=True):
        if source is None:
            assert actual.shape == (0,), name
        else:
            assert_close(actual, want.pop(0), 2 * TOLERANCE[dtype], name)


def test_elementwise_bn_add_relu_without_affine() -> None:
    z, r = activation((2, 20, 3, 3), torch.float32), activation((2, 20, 3, 3), torch.float32)
    mean, var, _, _ = affine_vectors(20, torch.float32)
    absent = (None, None)
    y = kernels.bn_add_relu(z, mean, var, *absent, EPS, r, mean, var, *absent, EPS, True)
    normal = [t.double() for t in (z, r, mean, var)]
    expected = bn(normal[0], *normal[2:], *absent) + bn(normal[1], *normal[2:], *absent)
    assert_close(y, F.relu(expected), 5e-6)
    got = kernels.bn_add_relu_backward(
        torch.ones_like(y), y, z, mean, var, None, EPS, r, mean, var, None, EPS, True
    )
    assert [i for i, gradient in enumerate(got) if gradient.numel() == 0] == [3, 8]
    assert len({id(gradient) for gradient in got}) == len(got)


def test_elementwise_odd_layouts() -> None:
    base = torch.randn(4, 40, 6, 10)
    mean, var, weight, bias = affine_vectors(20, torch.float32)
    z, r = base[::2, 3:23, 1:, ::3], base[1::2, :20, 1:, ::3]
    y = kernels.bn_add_relu(z, mean, var, weight, bias, EPS, r, *[None] * 4, 0.0, False)
    assert_close(y, bn(*[t.double() for t in (z, mean, var, weight, bias)]) + r.double(), 5e-6)
    assert_close(kernels.add_relu(z, r), F.relu(z.double() + r.double()), 5e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_statistics_channel_stats(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z = activation(shape, dtype)
    mean, var = stats_module.channel_stats(z)
    want_var, want_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    assert_close(mean, want_mean, 1e-6)
    assert_close(var, want_var, 1e-6)


def test_statistics_of_a_large_mean() -> None:
    z = torch.randn(8, 20, 16, 9) + 1000
    mean, var = stats_module.channel_stats(z)
    want_var, want_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    assert_close(mean, want_mean, 1e-7)
    assert_close(var, want_var, 1e-5)


@pytest.mark.parametrize("tiles", [1, 63, 65, 1024, 1025])
def test_statistics_merge(tiles: int) -> None:
    tile_rows, channels = 8, 20
    rows = tiles * tile_rows - 3
    z = torch.randn(rows, channels) * torch.rand(channels) + 100
    parts = z.double().split(tile_rows)
    part_mean = torch.stack([part.mean(0) for part in parts]).float()
    part_m2 = torch.stack([(part - part.mean(0)).square().sum(0) for part in parts]).float()
    mean, var = stats_module.merge_stats(part_mean, part_m2, rows, tile_rows)
    want_var, want_mean = torch.var_mean(z.double(), 0, correction=0)
    assert_close(mean, want_mean, 1e-7)
    assert_close(var, want_var, 1e-5)


# Every pool but one of many rows, which takes the interpreter long.
POOL_CASES = [(pool, torch.float32, True) for pool in POOLS if pool.name != "many-rows"]
POOL_CASES += [
    (pool, dtype, prologue)
    for pool in POOLS
    for dtype, prologue in ((torch.float16, True), (torch.float64, True), (torch.float32, False))
    if pool.name in ("odd", "gaps")
]


@pytest.mark.parametrize(("pool", "dtype", "prologue"), POOL_CASES, ids=str)
def test_elementwise_max_pool2d(pool: Pool, dtype: torch.dtype, prologue: bool) -> None:
    x = activation(pool.shape, dtype)
    before = affine_vectors(pool.c, dtype) if prologue else [None] * 4
    y = kernels.max_pool2d(x, *pool.geometry, *before, EPS)
    assert_channels_last(y, dtype)
    leaves = [exact(t).requires_grad_() for t in (x, *before) if t is not None]
    a = F.relu(bn(*leaves)) if prologue else leaves[0]
    expected = F.max_pool2d(a, *pool.geometry)
    assert_close(y, expected.detach(), TOLERANCE[dtype])

    dy = activation(tuple(expected.shape), dtype)
    got = kernels.max_pool2d_backward(dy, x, *pool.geometry, *before, EPS)
    assert_channels_last(got[0], dtype)
    want = gradients([expected], leaves, [dy])
    for name, actual in zip(["x", "mean", "var", "weight", "bias"], got, strict=True):
        if want:
            assert_close(actual, want.pop(0), 4 * TOLERANCE[dtype], name)
        else:
            assert actual.shape == (0,), name


def test_elementwise_max_pool2d_of_nan_infinity_and_equal_values(guards: Guards) -> None:
    guards.may_hold_nan = True
    x = torch.zeros(1, 2, 6, 6).contiguous(memory_format=torch.channels_last)
    x[0, 0, 2, 3] = math.nan
    x[0, 1] = -math.inf
    x.requires_grad_()
    geometry = ([3, 3], [2, 2], [1, 1])
    expected = F.max_pool2d(x, *geometry)
    dy = torch.rand_like(expected)
    (want,) = torch.autograd.grad(expected, x, dy)
    none = [None] * 4
    y = kernels.max_pool2d(x.detach(), *geometry, *none, EPS)
    torch.testing.assert_close(y, expected.detach(), equal_nan=True, rtol=0, atol=0)
    got = kernels.max_pool2d_backward(dy, x.detach(), *geometry, *none, EPS)[0]
    torch.testing.assert_close(got, want)


# N, Ci, H, W, Co, kernel, stride, padding, dilation, groups
CONVOLUTIONS = {
    "3x3": (2, 64, 7, 7, 64, (3, 3), [1, 1], [1, 1], [1, 1], 1),
    "3x3 stride 2": (2, 64, 8, 8, 128, (3, 3), [2, 2], [1, 1], [1, 1], 1),
    "3x3 odd": (3, 48, 9, 5, 80, (3, 3), [1, 1], [1, 1], [1, 1], 1),
    "3x3 batch 1": (1, 32, 3, 3, 16, (3, 3), [1, 1], [1, 1], [1, 1], 1),
    "1x1": (2, 128, 7, 7, 256, (1, 1), [1, 1], [0, 0], [1, 1], 1),
    "1x1 stride 2": (2, 64, 9, 9, 128, (1, 1), [2, 2], [0, 0], [1, 1], 1),
    "1x1 padded": (2, 16, 4, 4, 16, (1, 1), [1, 1], [1, 1], [1, 1], 1),
    "1x1 pixel": (5, 80, 1, 1, 48, (1, 1), [1, 1], [0, 0], [1, 1], 1),
    "7x7 stride 2": (1, 16, 15, 15, 64, (7, 7), [2, 2], [3, 3], [1, 1], 1),
    "uneven": (2, 32, 9, 12, 48, (3, 2), [2, 1], [0, 1], [1, 1], 1),
    "many rows": (1, 16, 24, 25, 80, (1, 1), [1, 1], [0, 0], [1, 1], 1),
    "stem": (2, 3, 17, 17, 64, (7, 7), [2, 2], [3, 3], [1, 1], 1),
    "small stem": (2, 3, 6, 5, 16, (3, 3), [1, 1], [1, 1], [1, 1], 1),
    "groups": (2, 32, 6, 6, 64, (3, 3), [1, 1], [1, 1], [1, 1], 4),
    "dilation": (2, 32, 9, 9, 32, (3, 3), [1, 1], [2, 2], [2, 2], 1),
    "ragged channels": (2, 20, 6, 6, 36, (3, 3), [1, 1], [1, 1], [1, 1], 1),
}
STEMS = {"stem", "small stem"}
BY_ATEN = {"groups", "dilation", "ragged channels"}
CONVOLUTION_CASES = [(name, torch.float32) for name in CONVOLUTIONS]
CONVOLUTION_CASES += [(name, torch.float16) for name in ("3x3 odd", "1x1 stride 2", "stem")]
CONVOLUTION_CASES += [(name, torch.float64) for name in ("3x3 odd", "groups")]


def conv_inputs(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple, tuple[int, ...]]:
    n, ci, h, w, co, kernel, *options = CONVOLUTIONS[name]
    x = activation((n, ci, h, w), dtype)
    weight = torch.randn(co, ci // options[3], *kernel) * (ci * kernel[0] * kernel[1]) ** -0.5
    weight = guarded(weight.to(dtype).to(memory_format=torch.channels_last))[0]
    shape = F.conv2d(x.double(), weight.double(), None, *options).shape
    return x, weight, tuple(options), tuple(shape)


def check_conv_bn_relu(
    name: str, dtype: torch.dtype, with_bias: bool, with_residual: bool, relu: bool
) -> None:
    x, weight, options, shape = conv_inputs(name, dtype)
    bias = vector(shape[1], dtype) if with_bias else None
    mean, var, bn_weight, bn_bias = affine_vectors(shape[1], dtype)
    r = activation(shape, dtype) if with_residual else None
    y = kernels.conv_bn_relu(
        x, weight, bias, mean, var, bn_weight, bn_bias, EPS, r, *options, relu, None
    )
    assert_channels_last(y, dtype)
    expected = F.conv2d(x.double(), weight.double(), exact(bias), *options)
    expected = bn(expected, *[t.double() for t in (mean, var, bn_weight, bn_bias)])
    expected = expected if r is None else expected + r.double()
    assert_close(y, F.relu(expected) if relu else expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("name", "dtype"), CONVOLUTION_CASES, ids=str)
def test_inference_conv_bn_relu(name: str, dtype: torch.dtype) -> None:
    check_conv_bn_relu(name, dtype, True, True, True)
    check_conv_bn_relu(name, dtype, False, False, False)


# Ten row blocks of two columns: a whole group of rows and a short one.
TILE_CASES = [("1x1", tile) for tile in tiles.CONV_TILES] + [("many rows", "small")]
TILE_CASES += [("stem", tile) for tile in tiles.STEM_TILES]


@pytest.mark.parametrize(("name", "tile"), TILE_CASES)
def test_inference_tiles(name: str, tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_module, "choose_conv", lambda *args: f"triton:{tile}")
    check_conv_bn_relu(name, torch.float32, True, True, True)


def test_inference_wide_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("conv", "bn_add_relu"):
        module = importlib.import_module(f"fastres.kernels.{module}")
        monkeypatch.setattr(module, "is_wide", lambda tensor: True)
    check_conv_bn_relu("3x3 odd", torch.float32, True, True, True)
    check_conv_bn_relu("stem", torch.float32, True, True, True)


def test_inference_without_affine_and_nan(guards: Guards) -> None:
    x, weight, options, shape = conv_inputs("3x3", torch.float32)
    mean, var, _, _ = affine_vectors(shape[1], torch.float32)
    x[0, :, 0, 0] = math.nan
    guards.may_hold_nan = True
    y = kernels.conv_bn_relu(
        x, weight, None, mean, var, None, None, EPS, None, *options, True, None
    )
    expected = F.relu(bn(F.conv2d(x, weight, None, *options), mean, var, None, None))
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


def check_conv_stats(name: str, dtype: torch.dtype, prologue: bool) -> None:
    x, weight, options, shape = conv_inputs(name, dtype)
    before = affine_vectors(x.shape[1], dtype) if prologue else [None] * 4
    z, mean, var = kernels.conv_stats(x, weight, *before, EPS, *options)
    assert_channels_last(z, dtype)
    leaves = [exact(t).requires_grad_() for t in (x, weight, *before) if t is not None]
    a = F.relu(bn(leaves[0], *leaves[2:])) if prologue else leaves[0]
    want_z = F.conv2d(a, leaves[1], None, *options)
    want_var, want_mean = torch.var_mean(want_z, (0, 2, 3), correction=0)
    assert_close(z, want_z.detach(), TOLERANCE[dtype], "z")
    assert_close(mean, want_mean.detach(), TOLERANCE[dtype], "mean")
    assert_close(var, want_var.detach(), TOLERANCE[dtype], "var")

    seeds = [activation(shape, dtype), vector(shape[1], dtype), vector(shape[1], dtype)]
    got = kernels.conv_stats_backward(
        *seeds, x, weight, z, mean, *before, EPS, *options, True, True
    )
    assert_channels_last(got[0], dtype)
    assert got[1].stride() == weight.stride()
    names = ["dinput", "dweight", "din_mean", "din_var", "din_weight", "din_bias"]
    want = gradients([want_z, want_mean, want_var], leaves, seeds)
    for name, actual in zip(names, got, strict=True):
        if want:
            assert_close(actual, want.pop(0), 4 * TOLERANCE[dtype], name)
        else:
            assert actual.shape == (0,), name


@pytest.mark.parametrize("prologue", [True, False], ids=["prologue", "plain"])
@pytest.mark.parametrize(("name", "dtype"), CONVOLUTION_CASES, ids=str)
def test_training_conv_stats(name: str, dtype: torch.dtype, prologue: bool) -> None:
    check_conv_stats(name, dtype, prologue)


GRADIENT_CASES = [
    ("3x3", "triton:tall+square", torch.float16, True),
    ("3x3 stride 2", "triton:square+tall", torch.float32, True),
    ("3x3 odd", "triton:small+small", torch.float32, True),
    ("3x3 odd", "dgrad:small", torch.float32, True),
    ("3x3 odd", "wgrad:tall", torch.float32, True),
    ("1x1", "triton_apply:square+square", torch.float32, True),
    ("1x1", "triton:tall+tall", torch.float16, False),
    ("1x1 stride 2", "triton_apply:small+small", torch.float32, True),
    ("1x1 stride 2", "dgrad:tall", torch.float32, False),
    ("1x1 stride 2", "wgrad:small", torch.float16, True),
    ("1x1 padded", "triton_apply:small+small", torch.float32, True),
    ("1x1 pixel", "triton_apply:tall+small", torch.float16, True),
    ("7x7 stride 2", "triton:small+small", torch.float32, False),
    ("uneven", "triton:small+small", torch.float32, True),
    ("many rows", "triton_apply:small+small", torch.float32, True),
]


@pytest.mark.parametrize(("name", "backward", "dtype", "prologue"), GRADIENT_CASES, ids=str)
def test_training_gradients(
    name: str, backward: str, dtype: torch.dtype, prologue: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_module, "choose_conv", lambda *args: "cudnn")
    monkeypatch.setattr(backward_module, "choose_conv", lambda *args: backward)
    # Five splits of the weight gradient's depth, and sums of partial sums.
    monkeypatch.setattr(gradients_module, "weight_splits", lambda tiles, steps, enough: 5)
    monkeypatch.setattr(gradients_module, "MAX_PARTIALS", 2)
    check_conv_stats(name, dtype, prologue)


@pytest.mark.parametrize(
    ("name", "tile", "dtype"),
    [
        ("1x1", "square", torch.float16),
        ("1x1", "wide", torch.float32),
        ("1x1 pixel", "tall", torch.float16),
        ("many rows", "small", torch.float32),
    ],
    ids=str,
)
def test_launch_by_tma(
    name: str, tile: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one or two programs, which take all tiles in turn; with and without the prologue."""
    monkeypatch.setattr(conv_module, "choose_conv", lambda *args: f"tma:{tile}")
    monkeypatch.setattr(backward_module, "choose_conv", lambda *args: "cudnn")
    check_conv_bn_relu(name, dtype, True, True, True)
    check_conv_stats(name, dtype, True)
    check_conv_stats(name, dtype, False)


def test_launch_by_tma_from_any_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_module, "choose_conv", lambda *args: "tma:small")
    x = torch.randn(801)[1:].view(2, 5, 5, 16).permute(0, 3, 1, 2)
    assert x.data_ptr() % 16
    weight = torch.randn(32, 16, 1, 1)
    z, _, _ = kernels.conv_stats(x, weight, *[None] * 4, EPS, [1, 1], [0, 0], [1, 1], 1)
    assert_close(z, F.conv2d(x.double(), weight.double()), 5e-6)


@pytest.mark.parametrize("name", ["stem", "small stem"])
def test_training_stem(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of the kernel is one tap: padding to its left and right is within the tap."""
    monkeypatch.setattr(conv_module, "choose_conv", lambda *args: "triton:tall")
    monkeypatch.setattr(backward_module, "choose_conv", lambda *args: "cudnn")
    check_conv_stats(name, torch.float32, False)
    check_conv_stats(name, torch.float16, False)


@pytest.mark.parametrize("tile", tiles.CONV_TILES)
@pytest.mark.parametrize("name", ["3x3 odd"])
def test_training_tiles(name: str, tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_module, "choose_conv", lambda *args: f"triton:{tile}")
    check_conv_stats(name, torch.float32, True)


def test_training_wide_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRES_GPU_CONV", "triton")
    names = ("conv", "conv_backward", "conv_gradients", "bn_add_relu", "channel_stats")
    for module in names:
        module = importlib.import_module(f"fastres.kernels.{module}")
        monkeypatch.setattr(module, "is_wide", lambda tensor: True)
    check_conv_stats("3x3 odd", torch.float32, True)
    check_conv_stats("1x1 stride 2", torch.float32, True)
    check_conv_stats("stem", torch.float32, True)


def test_training_statistics_of_a_large_mean() -> None:
    x = torch.randn(2, 16, 12, 12)
    x[:, 0] = 1000.0
    weight = torch.randn(32, 16, 1, 1) * 0.25
    weight[:, 0] = 1.0
    _, mean, var = kernels.conv_stats(x, weight, *[None] * 4, EPS, *[[1, 1], [0, 0], [1, 1]], 1)
    z = F.conv2d(x.double(), weight.double())
    want_var, want_mean = torch.var_mean(z, (0, 2, 3), correction=0)
    assert_close(mean, want_mean, 1e-6)
    assert_close(var, want_var, 1e-3)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["input", "weight"])
@pytest.mark.parametrize("prologue", [True, False], ids=["prologue", "plain"])
def test_training_gradients_not_asked_for(needs: tuple[bool, bool], prologue: bool) -> None:
    x, weight, options, shape = conv_inputs("3x3 odd", torch.float32)
    before = affine_vectors(x.shape[1], torch.float32) if prologue else [None] * 4
    z, mean, _ = kernels.conv_stats(x, weight, *before, EPS, *options)
    seeds = [activation(shape, torch.float32), mean, mean]
    call = (*seeds, x, weight, z, mean, *before, EPS, *options)
    everything = kernels.conv_stats_backward(*call, True, True)
    some = kernels.conv_stats_backward(*call, *needs)
    asked = [needs[0], needs[1], *[needs[0] and prologue] * 4]
    for wanted, partial, full in zip(asked, some, everything, strict=True):
        if wanted:
            torch.testing.assert_close(partial, full)
        else:
            assert partial.shape == (0,)
    assert len({id(gradient) for gradient in some}) == len(some)


def test_training_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, options, _ = conv_inputs("many rows", torch.float32)
    monkeypatch.setattr(gradients_module, "weight_splits", lambda tiles, steps, enough: 5)

    def step() -> list[Tensor]:
        z, mean, var = kernels.conv_stats(x, weight, *[None] * 4, EPS, *options)
        call = (z, mean, var, x, weight, z, mean, *[None] * 4, EPS, *options, True, True)
        return [z, mean, var, *kernels.conv_stats_backward(*call, "triton:small+small")]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_launch_choice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, options, _ = conv_inputs(name, torch.float32)
    torch.empty(1).zero_()
    for op in choice.OPS:
        for asked in ("auto", "triton", "cudnn"):
            monkeypatch.setenv("FASTRES_GPU_CONV", asked)
            chosen = kernels.choose_conv(x, weight, *options, op)
            who, _, tile = chosen.partition(":")
            if op in choice.BACKWARD_OPS:
                how = tiles.GRADIENTS[chosen]
                ours = how.dgrad is not None and how.wgrad is not None
                never = name in BY_ATEN | STEMS or asked == "cudnn"
                assert not (ours and never)
                assert ours or never or asked == "auto"
                continue
            stem = name in STEMS and (asked == "auto" or op == "bn_conv_stats")
            assert who == ("cudnn" if name in BY_ATEN or asked == "cudnn" or stem else "triton")
            assert (tile in tiles.CONV_TILES) == (who == "triton")
    monkeypatch.setenv("FASTRES_GPU_CONV", "fastest")
    with pytest.raises(ValueError, match="FASTRES_GPU_CONV is 'fastest'"):
        kernels.choose_conv(x, weight, *options, "conv_stats")


def test_launch_asks_cudnn_for_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """While aten convolves, and not after; two threads share the switch."""
    seen = []

    def watched(name: str) -> Callable[..., object]:
        plain = getattr(torch.ops.aten, name)

        def call(*arguments: object) -> object:
            with launch_module.deterministic_cudnn():
                pass
            seen.append(torch.backends.cudnn.deterministic)
            return plain(*arguments)

        return call

    for name in ("convolution", "convolution_backward"):
        monkeypatch.setattr(torch.ops.aten, name, watched(name))
    monkeypatch.setenv("FASTRES_GPU_CONV", "cudnn")
    check_conv_bn_relu("1x1 pixel", torch.float32, True, True, True)
    check_conv_stats("1x1 pixel", torch.float32, True)
    assert seen == [True] * 3
    assert not torch.backends.cudnn.deterministic


def test_launch_by_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRES_GPU_CONV", "cudnn")
    check_conv_bn_relu("3x3 odd", torch.float32, True, True, True)
    check_conv_stats("3x3 odd", torch.float32, True)


def relu_by_torch(x: Tensor, weight: Tensor, bias: Tensor, *geometry: object) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, *geometry))


def add_relu_by_torch(
    x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *geometry: object
) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, *geometry) + alpha * z)


@pytest.mark.parametrize("name", ["3x3 odd", "stem"])
@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add_relu"])
def test_launch_by_cudnns_fused_kernels(
    name: str, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # cuDNN itself is not here: what it is given is, and what it is said to do with it.
    chosen = "cudnn_add_relu" if residual else "cudnn_relu"
    monkeypatch.setattr(conv_module, "choose_conv", lambda *args: chosen)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu_by_torch)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu_by_torch)
    check_conv_bn_relu(name, torch.float32, True, residual, True)
    check_conv_bn_relu(name, torch.float32, False, residual, True)


def test_launch_tuning_admits_right_answers_alone(
    monkeypatch: pytest.MonkeyPatch, guards: Guards
) -> None:
    guards.may_hold_nan = True  # what a candidate makes of a NaN is looked at
    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu_by_torch)
    key = choice.ConvKey.parse(
        "conv_bn_relu tf32 input 2x16x6x6 weight 16x16x3x3 stride 1x1 padding 1x1"
    )
    device = torch.device("cpu")
    names = choice.candidates(key, torch.float32, "sm_90")
    assert names == ["triton:square", "triton:tall", "triton:small", "cudnn", "cudnn_relu"]
    names = ["triton:small", "cudnn", "cudnn_relu"]

    def admitted() -> list[str]:
        return list(tune.contestants(key, torch.float32, device, names))

    assert admitted() == names
    by_torch = relu_by_torch
    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda *a: by_torch(*a) * 1.001)
    assert admitted() == ["triton:small", "cudnn"]
    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda *a: by_torch(*a).nan_to_num())
    assert admitted() == ["triton:small", "cudnn"]

    def refuse(*arguments: object) -> None:
        raise RuntimeError("no engine")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", refuse)
    assert admitted() == ["triton:small", "cudnn"]
    for run in tune.contestants(key, torch.float32, device, names).values():
        run()


def test_launch_tuning_of_the_backward(monkeypatch: pytest.MonkeyPatch, guards: Guards) -> None:
    guards.may_hold_nan = True
    key = choice.ConvKey.parse(
        "bn_conv_stats_backward tf32 input 2x16x6x6 weight 16x16x1x1 stride 2x2 padding 0x0"
    )
    names = ["triton_apply:small+small", "dgrad:small", "wgrad:small", "cudnn"]

    def admitted() -> list[str]:
        return list(tune.contestants(key, torch.float32, torch.device("cpu"), names))

    assert admitted() == names
    right = gradients_module.weight_gradient
    monkeypatch.setattr(backward_module, "weight_gradient", lambda *a: right(*a) * 1.001)
    assert admitted() == ["dgrad:small", "cudnn"]
    monkeypatch.setattr(backward_module, "weight_gradient", lambda *a: right(*a).nan_to_num())
    assert admitted() == ["dgrad:small", "cudnn"]


def test_launch_without_tf32_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x, weight, options, _ = conv_inputs("3x3", torch.float32)
    torch.empty(1).zero_()
    assert kernels.choose_conv(x, weight, *options, "conv_stats") == "cudnn"
    chosen = kernels.choose_conv(x.half(), weight.half(), *options, "conv_stats")
    assert chosen.startswith("triton:")


def test_launch_odd_layouts() -> None:
    x = torch.randn(4, 40, 9, 9)[::2, 3:35]
    weight = torch.randn(48, 64, 3, 3)[:, ::2]
    z, _, _ = kernels.conv_stats(x, weight, *[None] * 4, EPS, [1, 1], [1, 1], [1, 1], 1)
    assert_close(z, F.conv2d(x.double(), weight.double(), padding=1), 5e-6)


@pytest.mark.parametrize("channels", [3, 32])
def test_launch_empty_batch(channels: int) -> None:
    x, weight = torch.randn(0, channels, 8, 8), torch.randn(16, channels, 3, 3)
    options = ([1, 1], [1, 1], [1, 1], 1)
    vectors = affine_vectors(16, torch.float32)
    y = kernels.conv_bn_relu(x, weight, None, *vectors, EPS, None, *options, True, None)
    assert y.shape == (0, 16, 8, 8)
    before = affine_vectors(channels, torch.float32)
    z, mean, var = kernels.conv_stats(x, weight, *before, EPS, *options)
    assert z.shape == (0, 16, 8, 8)
    assert not mean.any()
    assert not var.any()
    got = kernels.conv_stats_backward(
        z, mean, var, x, weight, z, mean, *before, EPS, *options, True, True
    )
    assert got[0].shape == x.shape
    assert not any(gradient.any() for gradient in got)
    got = kernels.bn_add_relu_backward(z, z, z, *vectors[:3], EPS, z, *vectors[:3], EPS, True)
    assert not any(gradient.any() for gradient in got)
    assert kernels.add_relu(x, x).shape == x.shape


WRONG = torch.zeros(5)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (lambda x, w, v: kernels.add_relu(x, x[:1]), "fastres::add_relu: residual is"),
        (lambda x, w, v: kernels.add_relu(x, x.half()), "fastres::add_relu: residual is"),
        (
            lambda x, w, v: kernels.bn_add_relu(
                x, WRONG, v, v, v, EPS, None, *[None] * 4, 0.0, True
            ),
            r"fastres::bn_add_relu: mean is \(5,\)",
        ),
        (
            lambda x, w, v: kernels.conv_stats(
                x, w[:, :3], *[None] * 4, EPS, [1, 1], [1, 1], [1, 1], 1
            ),
            "fastres::conv_stats: input has 16 channels, expected 3",
        ),
        (
            lambda x, w, v: kernels.conv_bn_relu(
                x, w, None, v, v, v, v, EPS, x[:, :, 1:], [1, 1], [1, 1], [1, 1], 1, True, None
            ),
            "fastres::conv_bn_relu: residual is",
        ),
        (
            lambda x, w, v: kernels.conv_stats(x, w, *[None] * 4, EPS, [1, 1], [0, 0], [9, 9], 1),
            "fastres::conv_stats: output would be",
        ),
    ],
)
def test_launch_errors(launch: Callable[..., object], message: str, guards: Guards) -> None:
    x, w, v = torch.randn(2, 16, 5, 5), torch.randn(16, 16, 3, 3), torch.ones(16)
    guards.may_hold_nan = True
    torch.empty(1)
    with pytest.raises(RuntimeError, match=message):
        launch(x, w, v)

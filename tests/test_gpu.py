"""Every op on a GPU against float64, torch's own error in the same dtype being the yardstick."""

import copy
import dataclasses
import importlib
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastres
from cases import ODD_ACTIVATIONS, ODD_CONVS, POOLS, RESNET_CONVS, Activation, Conv, Pool
from fastres import tune
from fastres.kernels import _tiles as tiles
from fastres.kernels import choice
from fastres.ops import reference
from tolerances import assert_within_twice, relative_error

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCH = 4
# Sixteens of channels take Triton's convolution; the odd ones cuDNN's and Triton's statistics.
CONVS = [conv.batch(BATCH) for conv in RESNET_CONVS] + list(ODD_CONVS)
TRITON_CONVS = [conv for conv in CONVS if conv.c_in % 16 == 0]
ops = torch.ops.fastres


def activation(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, device=DEVICE, dtype=dtype)
    return values.to(memory_format=torch.channels_last)


def vector(channels: int, low: float = -1.0) -> Tensor:
    return torch.rand(channels, device=DEVICE) * 2 + low


def affine(channels: int) -> list[Tensor]:
    """mean, var, weight, bias."""
    mean, weight, bias = (vector(channels) for _ in range(3))
    return [mean, vector(channels, low=0.5), weight, bias]


def doubles(arguments: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(a.double() if isinstance(a, Tensor) else a for a in arguments)


def compare(name: str, *arguments: object) -> tuple[Tensor, ...]:
    """Run an op, hold every result to torch's error in the same dtype; returns the results."""

    def results(function, values):
        found = function(*values)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    actual = results(getattr(ops, name), arguments)
    by_torch = results(getattr(reference, name), arguments)
    exact = results(getattr(reference, name), doubles(arguments))
    for i, (ours, theirs, true) in enumerate(zip(actual, by_torch, exact, strict=True)):
        assert ours.dtype == theirs.dtype, (name, i)
        if ours.dim() == 4 and ours.shape[1:] == actual[0].shape[1:]:
            assert ours.is_contiguous(memory_format=torch.channels_last), (name, i)
        assert_within_twice(ours, theirs, true, f"{name}: result {i}")
    return actual


def conv_inputs(conv: Conv, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[object, ...]]:
    x = activation((conv.n, conv.c_in, conv.size, conv.size), dtype)
    weight = activation((conv.c_out, conv.c_in, conv.kernel, conv.kernel), dtype)
    weight = weight * (conv.c_in * conv.kernel**2) ** -0.5
    options = ([conv.stride] * 2, [conv.padding] * 2, [1, 1], 1)
    return x, weight, options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_ACTIVATIONS, ids=str)
def test_add_relu(case: Activation, dtype: torch.dtype) -> None:
    x, r, dy = (activation(case.shape, dtype) for _ in range(3))
    (y,) = compare("add_relu", x, r)
    compare("add_relu_backward", dy, y)


@pytest.mark.parametrize("residual", ["none", "plain", "projection"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_ACTIVATIONS, ids=str)
def test_bn_add_relu(case: Activation, dtype: torch.dtype, relu: bool, residual: str) -> None:
    z, dy = activation(case.shape, dtype), activation(case.shape, dtype)
    r = None if residual == "none" else activation(case.shape, dtype)
    mean, var, weight, bias = affine(case.c)
    r_mean, r_var, r_weight, r_bias = affine(case.c) if residual == "projection" else [None] * 4
    branch = (r, r_mean, r_var, r_weight)
    (y,) = compare("bn_add_relu", z, mean, var, weight, bias, EPS, *branch, r_bias, EPS, relu)
    compare("bn_add_relu_backward", dy, y, z, mean, var, weight, EPS, *branch, EPS, relu)


@pytest.mark.parametrize("prologue", [True, False], ids=["prologue", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_max_pool2d(pool: Pool, dtype: torch.dtype, prologue: bool) -> None:
    x, dy = activation(pool.shape, dtype), activation(pool.out, dtype)
    before = affine(pool.c) if prologue else [None] * 4
    compare("max_pool2d", x, *pool.geometry, *before, EPS)
    # With the exact maxima: of values that are close, roundings choose one or the other.
    got = ops.max_pool2d_backward(dy, x, *pool.geometry, *before, EPS)
    exact = reference.max_pool2d_backward(*doubles((dy, x, *pool.geometry, *before, EPS)))
    for ours, true in zip(got, exact, strict=True):
        assert ours.shape == true.shape
        assert relative_error(ours, true) <= (1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("by", ["triton", "cudnn"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_conv_bn_relu(
    conv: Conv, dtype: torch.dtype, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRES_GPU_CONV", by)
    x, weight, options = conv_inputs(conv, dtype)
    r = activation((conv.n, conv.c_out, conv.out, conv.out), dtype)
    bn = affine(conv.c_out)
    compare("conv_bn_relu", x, weight, vector(conv.c_out), *bn, EPS, r, *options, True, None)
    compare("conv_bn_relu", x, weight, None, *bn, EPS, None, *options, False, None)


@pytest.mark.parametrize("by", ["triton", "cudnn"])
@pytest.mark.parametrize("prologue", [True, False], ids=["prologue", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_conv_stats(
    conv: Conv, dtype: torch.dtype, prologue: bool, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRES_GPU_CONV", by)
    x, weight, options = conv_inputs(conv, dtype)
    before = affine(conv.c_in) if prologue else [None] * 4
    z, mean, _ = compare("conv_stats", x, weight, *before, EPS, *options)
    dz, dmean, dvar = activation(tuple(z.shape), dtype), vector(conv.c_out), vector(conv.c_out)
    call = (dz, dmean, dvar, x, weight, z, mean, *before, EPS, *options)
    compare("conv_stats_backward", *call, True, True)


@pytest.mark.parametrize("tile", ["wide", "square", "tall", "small"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conv", TRITON_CONVS[:8], ids=str)
def test_every_tile(
    conv: Conv, dtype: torch.dtype, tile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("fastres.kernels.conv")
    monkeypatch.setattr(module, "choose_conv", lambda *args: f"triton:{tile}")
    monkeypatch.setenv("FASTRES_GPU_CONV", "triton")
    x, weight, options = conv_inputs(conv, dtype)
    compare("conv_bn_relu", x, weight, None, *affine(conv.c_out), EPS, None, *options, True, None)
    compare("conv_stats", x, weight, *affine(conv.c_in), EPS, *options)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="the GPU has no tensor memory accelerator",
)
@pytest.mark.parametrize("tile", tiles.CONV_TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 7, 28])
def test_every_tile_by_tma(
    size: int, dtype: torch.dtype, tile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("fastres.kernels.conv")
    monkeypatch.setattr(module, "choose_conv", lambda *args: f"tma:{tile}")
    conv = Conv("1x1", 80, 272, 1, 1, size, n=4)
    x, weight, options = conv_inputs(conv, dtype)
    r = activation((conv.n, conv.c_out, size, size), dtype)
    compare("conv_bn_relu", x, weight, None, *affine(conv.c_out), EPS, r, *options, True, None)
    compare("conv_stats", x, weight, *affine(conv.c_in), EPS, *options)
    compare("conv_stats", x, weight, *[None] * 4, EPS, *options)


# A pointwise convolution, and one whose data gradient has four phases.
GRADIENT_CONVS = [Conv("1x1", 128, 256, 1, 1, 28, n=4), Conv("3x3", 128, 256, 3, 2, 28, n=4)]


@pytest.mark.parametrize("name", tiles.GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conv", GRADIENT_CONVS, ids=str)
def test_every_gradient(
    conv: Conv, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiles.GRADIENTS[name].apply and conv.kernel > 1:
        pytest.skip("the statistics' gradient is joined for one tap alone")
    module = importlib.import_module("fastres.kernels.conv_backward")
    monkeypatch.setattr(module, "choose_conv", lambda *args: name)
    x, weight, options = conv_inputs(conv, dtype)
    z = activation((conv.n, conv.c_out, conv.out, conv.out), dtype)
    dz, dmean, dvar = activation(tuple(z.shape), dtype), vector(conv.c_out), vector(conv.c_out)
    call = (dz, dmean, dvar, x, weight, z, vector(conv.c_out), *affine(conv.c_in), EPS, *options)
    first = compare("conv_stats_backward", *call, True, True)
    again = ops.conv_stats_backward(*call, True, True)
    if tiles.GRADIENTS[name].dgrad and tiles.GRADIENTS[name].wgrad:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate that is admitted is timed, and the table decides from then on."""
    config = tune.TuneConfig(model=("resnet18",), size=32, infer=(2,), train=(2,))
    path = tune.tune(dataclasses.replace(config, out=tmp_path / "table.json"))
    table = choice.read_table(path)
    assert table.measured
    assert set(table.choices) == set(tune.keys_of(config))
    monkeypatch.setenv("FASTRES_GPU_TABLE", str(path))
    for key, chosen in table.choices.items():
        device = torch.device("cuda", torch.cuda.current_device())
        assert choice.explain(key, torch.bfloat16, device)[0] == chosen
    assert all(row[2] for row in tune.typical_choices())


def test_statistics_of_a_large_mean() -> None:
    x = activation((8, 16, 32, 32), torch.float32)
    x[:, 0] = 1000
    weight = torch.eye(16, device=DEVICE)[:, :, None, None].repeat(2, 1, 1, 1)
    weight[:, 0] = 1
    _, mean, var = ops.conv_stats(x, weight, *[None] * 4, EPS, [1, 1], [0, 0], [1, 1], 1)
    z = torch.nn.functional.conv2d(x.double(), weight.double())
    want_var, want_mean = torch.var_mean(z, (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), want_mean, rtol=1e-3, atol=0)
    torch.testing.assert_close(var.double(), want_var, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_passes(dtype: torch.dtype) -> None:
    x, weight, options = conv_inputs(Conv("nan", 64, 64, 3, 1, 14, n=2), dtype)
    x[0, 0, 0, 0] = math.nan
    y = ops.conv_bn_relu(x, weight, None, *affine(64), EPS, None, *options, True, None)
    assert y[0, :, :2, :2].isnan().all()
    assert not y[1].isnan().any()
    z, mean, _ = ops.conv_stats(x, weight, *affine(64), EPS, *options)
    assert z[0, :, :2, :2].isnan().all()
    assert mean.isnan().all()


def forward_and_backward(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)
    x, weight, options = conv_inputs(Conv("block", 64, 128, 3, 2, 28, n=8), dtype)
    before, after = affine(64), affine(128)
    torch.cuda.synchronize()

    def step() -> list[Tensor]:
        z, mean, var = ops.conv_stats(x, weight, *before, EPS, *options)
        none = (None,) * 5
        y = ops.bn_add_relu(z, mean, var, *after[2:], EPS, *none, EPS, True)
        grads = ops.bn_add_relu_backward(y, y, z, mean, var, after[2], EPS, *none[1:], EPS, True)
        call = (*grads[:3], x, weight, z, mean, *before, EPS, *options)
        return [z, y, *grads, *ops.conv_stats_backward(*call, True, True)]

    step_results = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for eager, replayed in zip(step_results, captured, strict=True):
        torch.testing.assert_close(eager, replayed)
    return step_results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_graph(dtype: torch.dtype) -> None:
    forward_and_backward(dtype)


def test_forward_is_deterministic() -> None:
    x, weight, options = conv_inputs(Conv("again", 64, 256, 1, 1, 56, n=8), torch.bfloat16)
    first = ops.conv_stats(x, weight, *affine(64), EPS, *options)
    torch.manual_seed(0)
    x, weight, options = conv_inputs(Conv("again", 64, 256, 1, 1, 56, n=8), torch.bfloat16)
    second = ops.conv_stats(x, weight, *affine(64), EPS, *options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_backward_by_cudnn_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRES_GPU_CONV", "cudnn")
    for conv in (Conv("3x3", 64, 64, 3, 1, 56, n=16), Conv("1x1", 64, 256, 1, 1, 56, n=16)):
        x, weight, options = conv_inputs(conv, torch.bfloat16)
        before = affine(conv.c_in)
        z, mean, var = ops.conv_stats(x, weight, *before, EPS, *options)
        call = (z, mean, var, x, weight, z, mean, *before, EPS, *options, True, True)
        runs = [ops.conv_stats_backward(*call) for _ in range(3)]
        for again in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="the GPU has no tensor memory accelerator",
)
def test_cuda_graph_by_tma(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph holds the descriptors: new values at the same addresses, new results."""
    module = importlib.import_module("fastres.kernels.conv")
    monkeypatch.setattr(module, "choose_conv", lambda *args: "tma:square")
    x, weight, options = conv_inputs(Conv("1x1", 64, 256, 1, 1, 28, n=8), torch.bfloat16)
    call = (x, weight, *affine(64), EPS, *options)
    ops.conv_stats(*call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.conv_stats(*call)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        for replayed, eager in zip(captured, ops.conv_stats(*call), strict=True):
            assert torch.equal(replayed, eager)


@pytest.mark.parametrize("tile", tiles.STEM_TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "stride", "size"), [(7, 2, 61), (3, 1, 32)])
def test_stem(
    kernel: int,
    stride: int,
    size: int,
    dtype: torch.dtype,
    tile: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module("fastres.kernels.conv")
    monkeypatch.setattr(module, "choose_conv", lambda *args: f"triton:{tile}")
    x, weight, options = conv_inputs(Conv("stem", 3, 64, kernel, stride, size, n=4), dtype)
    compare("conv_bn_relu", x, weight, None, *affine(64), EPS, None, *options, True, None)
    compare("conv_stats", x, weight, *[None] * 4, EPS, *options)


def test_more_than_32_bit_offsets() -> None:
    rows, channels = 2**25 + 100, 64
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.zeros(1, channels, rows, 1, device=DEVICE, dtype=torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)
    x[0, :, -1, 0] = torch.arange(channels, device=DEVICE)
    y = ops.add_relu(x, x)
    assert torch.equal(y[0, :, -1, 0], 2 * x[0, :, -1, 0])
    del y
    weight = torch.eye(64, device=DEVICE, dtype=torch.float16)[:, :, None, None]
    z, mean, _ = ops.conv_stats(x, weight, *[None] * 4, EPS, [1, 1], [0, 0], [1, 1], 1)
    assert torch.equal(z[0, :, -1, 0], x[0, :, -1, 0])
    torch.testing.assert_close(mean, x[0, :, -1, 0].float() / rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight, options = conv_inputs(Conv("opcheck", 32, 48, 3, 1, 7, n=2), dtype)
    x.requires_grad_()
    weight = weight.detach().requires_grad_()
    torch.library.opcheck(ops.conv_stats.default, (x, weight, *affine(32), EPS, *options))
    z, mean, var = (t.detach() for t in ops.conv_stats(x, weight, *affine(32), EPS, *options))
    call = (z, mean, var, *affine(48)[2:], EPS, z, *[None] * 4, 0.0, True)
    torch.library.opcheck(ops.bn_add_relu.default, call)
    torch.library.opcheck(ops.add_relu.default, (z, z))
    call = (x, weight, None, *affine(48), EPS, None, *options, True, None)
    torch.library.opcheck(ops.conv_bn_relu.default, call)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("depth", [18, 50])
def test_model(depth: int, stem: str, train: bool) -> None:
    build = getattr(fastres, f"resnet{depth}")
    plain = build(num_classes=10, stem=stem).to(DEVICE, memory_format=torch.channels_last)
    fused = build(num_classes=10, stem=stem, fused=True)
    fused = fused.to(DEVICE, memory_format=torch.channels_last)
    fused.load_state_dict(plain.state_dict())
    exact = copy.deepcopy(plain).double()
    x = activation((8, 3, 64, 64), torch.float32)
    target = torch.arange(8, device=DEVICE)
    outputs = []
    for model, images in ((fused, x), (plain, x), (exact, x.double())):
        outputs.append(model.train(train)(images))
        F.cross_entropy(outputs[-1], target).backward()
    # Roundings grow layer by layer, and differently: four times torch's error, not twice.
    assert_within_twice(*(output.detach() for output in outputs), "output", factor=4)
    states = (fused.state_dict(), plain.state_dict(), exact.state_dict())
    for name in (key for key in states[0] if "running" in key):
        assert_within_twice(*(state[name] for state in states), name, factor=4)
    # All gradients as one vector, and a floor: a ReLU that rounding flips is a step, not an error.
    gradients = (
        torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        for model in (fused, plain, exact)
    )
    ours, theirs, true = gradients
    assert relative_error(ours, true) <= 4 * relative_error(theirs, true) + 2e-3

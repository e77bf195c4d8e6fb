"""The CPU kernel of conv_stats_backward: every gradient against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from algorithms import AMX
from torch import Tensor

from cases import ODD_CONVS, RESNET_CONVS, Conv
from fastres.ops import reference
from running import on_other_instruction_sets, run_tests
from tolerances import assert_within_twice

OPS = torch.ops.fastres
NAMES = ("dinput", "dweight", "din_mean", "din_var", "din_weight", "din_bias")


def reduced(conv: Conv) -> Conv:
    """The same kernel on fewer channels and pixels; 7x7 and 4x4 pictures stay what they are."""
    channels = {"c_in": min(conv.c_in, 80), "c_out": min(conv.c_out, 96)}
    return replace(conv, **channels, n=2, size=min(conv.size, 16))


REDUCED_CONVS = tuple(
    {(c.c_in, c.c_out, c.kernel, c.stride, c.size): c for c in map(reduced, RESNET_CONVS)}.values()
)
# As many channels as the real ones: where blocks, panels and partial sums have edges.
WHOLE_CONVS = (
    Conv("resnet-1x1", 256, 64, 1, 1, 40, n=2),
    Conv("resnet-1x1-wide", 512, 2048, 1, 1, 7),
    Conv("resnet-1x1-stride-2", 256, 512, 1, 2, 28),
    Conv("resnet-3x3", 64, 64, 3, 1, 32, n=4),
    Conv("resnet-3x3-small-picture", 512, 512, 3, 1, 4, n=3),
    # Five images among four threads: parts of two, two and one.
    Conv("resnet-3x3-five-images", 64, 64, 3, 2, 14, n=5),
    Conv("resnet-3x3-narrow", 32, 48, 3, 1, 7, n=13),
    Conv("resnet-3x3-stride-2", 256, 512, 3, 2, 14),
)


@dataclass
class Case:
    """Arguments of conv_stats_backward, beside the same in float64."""

    conv: Conv
    dtype: torch.dtype
    prologue: bool = True
    affine: bool = True
    padding: int | None = None
    dilation: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        c, dtype = self.conv, self.dtype
        p = torch.float64 if dtype == torch.float64 else torch.float32
        self.geometry = (
            [c.stride] * 2,
            [c.padding if self.padding is None else self.padding] * 2,
            [self.dilation] * 2,
            self.groups,
        )
        fan_in = c.c_in // self.groups * c.kernel**2
        weight = torch.randn(c.c_out, c.c_in // self.groups, c.kernel, c.kernel) / fan_in**0.5
        self.weight = weight.to(dtype)
        self.input = channels_last(torch.randn(c.n, c.c_in, c.size, c.size).to(dtype))
        self.in_vectors: list[Tensor | None] = [None] * 4
        if self.prologue:
            mean, in_weight, in_bias = torch.randn(3, c.c_in).to(p)
            var = (torch.rand(c.c_in) + 0.5).to(p)
            self.in_vectors = [mean, var, *([in_weight, in_bias] if self.affine else [None] * 2)]
        self.leaves = [
            None if t is None else t.double().clone().requires_grad_()
            for t in (self.input, self.weight, *self.in_vectors)
        ]
        x, w, *vectors = self.leaves
        if self.prologue:
            mean, var, in_weight, in_bias = vectors
            x = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 1e-5)
            if self.affine:
                x = x * in_weight[:, None, None] + in_bias[:, None, None]
            x = torch.relu(x)
        self.outputs = self._outputs(torch.conv2d(x, w, None, *self.geometry))
        z, mean, _ = (t.detach() for t in self.outputs)
        self.z, self.mean = channels_last(z.to(dtype)), mean.to(p)
        self.dz = channels_last(torch.randn(z.shape).to(dtype))
        self.dmean, self.dvar = torch.randn(2, c.c_out).to(p)

    @staticmethod
    def _outputs(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = z.mean((0, 2, 3))
        return z, mean, (z - mean[:, None, None]).square().mean((0, 2, 3))

    def exact(self) -> list[Tensor | None]:
        """Every gradient, by autograd in float64 through convolution, mean and variance."""
        leaves = [leaf for leaf in self.leaves if leaf is not None]
        gradients = iter(
            torch.autograd.grad(
                self.outputs,
                leaves,
                (self.dz.double(), self.dmean.double(), self.dvar.double()),
                retain_graph=True,
            )
        )
        return [None if leaf is None else next(gradients) for leaf in self.leaves]

    def backward(self, ops=OPS, needs_input: bool = True, needs_weight: bool = True):
        return ops.conv_stats_backward(
            self.dz, self.dmean, self.dvar, self.input, self.weight, self.z, self.mean,
            *self.in_vectors, 1e-5, *self.geometry, needs_input, needs_weight,
        )  # fmt: skip

    def check(self) -> None:
        got, of_reference = self.backward(), self.backward(reference)
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        for name, ours, theirs, exact in zip(NAMES, got, of_reference, self.exact(), strict=True):
            if exact is None:
                assert ours.shape == (0,), name
            else:
                assert ours.dtype == theirs.dtype, name
                # How exact a single sum comes out is luck; over many channels it evens out.
                factor = self.conv.factor if exact.numel() > 4 else 20.0
                assert_within_twice(ours, theirs, exact, name, factor)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("prologue", [False, True], ids=("plain", "prologue"))
@pytest.mark.parametrize("conv", REDUCED_CONVS + WHOLE_CONVS, ids=str)
def test_resnet_shapes(conv: Conv, prologue: bool) -> None:
    Case(conv, torch.float32, prologue).check()


@pytest.mark.parametrize("prologue", [False, True], ids=("plain", "prologue"))
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("conv", [conv for conv in ODD_CONVS if conv.n > 0], ids=str)
def test_odd_shapes(conv: Conv, dtype: torch.dtype, prologue: bool) -> None:
    Case(conv, dtype, prologue).check()


@pytest.mark.parametrize("prologue", [False, True], ids=("plain", "prologue"))
@pytest.mark.parametrize(
    "options",
    [
        {"groups": 4},
        {"dilation": 2, "padding": 2},
        {"padding": 0},
        {"padding": 2},
        {"affine": False},
    ],
    ids=str,
)
def test_other_convolutions(options: dict[str, int], prologue: bool) -> None:
    Case(Conv("conv", 24, 32, 3, 1, 9, n=2), torch.float32, prologue, **options).check()
    Case(Conv("conv-stride-2", 24, 32, 3, 2, 9, n=2), torch.float32, prologue, **options).check()


def test_1x1_with_padding() -> None:
    Case(Conv("padded", 24, 32, 1, 1, 6, n=2), torch.float32, True, padding=1).check()
    Case(Conv("padded-stride-2", 24, 32, 1, 2, 6, n=2), torch.float32, False, padding=1).check()


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("prologue", [False, True], ids=("plain", "prologue"))
def test_only_what_is_asked_for(kernel: int, prologue: bool) -> None:
    case = Case(Conv("conv", 20, 24, kernel, 1, 6, n=2), torch.float32, prologue)
    everything = case.backward()
    no_weight = case.backward(needs_weight=False)
    no_input = case.backward(needs_input=False)
    assert no_weight[1].shape == (0,)
    for got, want in zip(
        no_weight[:1] + no_weight[2:], everything[:1] + everything[2:], strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(no_input[1], everything[1], rtol=1e-5, atol=1e-5)
    assert all(t.shape == (0,) for t in no_input[:1] + no_input[2:])
    assert all(t.shape == (0,) for t in case.backward(needs_input=False, needs_weight=False))


@pytest.mark.parametrize(
    "conv",
    [Conv("empty-3x3", 16, 32, 3, 1, 8, n=0), Conv("empty-1x1", 8, 16, 1, 1, 4, n=0)],
    ids=str,
)
@pytest.mark.parametrize("prologue", [False, True], ids=("plain", "prologue"))
def test_empty_batch(conv: Conv, prologue: bool) -> None:
    case = Case(conv, torch.float32, prologue)
    dinput, dweight, *vectors = case.backward()
    assert dinput.shape == (0, conv.c_in, conv.size, conv.size)
    assert dweight.shape == (conv.c_out, conv.c_in, conv.kernel, conv.kernel)
    assert not dweight.any()
    for vector in vectors:
        assert vector.shape == ((conv.c_in,) if prologue else (0,))
        assert not vector.any()


@pytest.mark.parametrize("kernel", [1, 3])
def test_layouts_do_not_matter(kernel: int) -> None:
    case = Case(Conv("conv", 12, 20, kernel, 1, 9, n=2), torch.float32)
    want = case.backward()
    assert want[1].is_contiguous()
    case.input, case.z = case.input.contiguous(), case.z.contiguous()
    wide = torch.full((2, 25, 12, 10), float("nan"))
    wide[:, 2:22, 1:10, :9] = case.dz
    case.dz = wide[:, 2:22, 1:10, :9]
    for got, expected in zip(case.backward(), want, strict=True):
        assert_same_bits(got, expected)
    case.weight = channels_last(case.weight)
    dinput, dweight, *_ = case.backward()
    torch.testing.assert_close(dinput, want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dweight, want[1], rtol=1e-5, atol=1e-4)
    assert dweight.is_contiguous(memory_format=torch.channels_last)
    case.dz = torch.ones(()).expand(case.z.shape)
    expanded = case.backward()
    case.dz = case.dz.contiguous()
    for got, expected in zip(case.backward(), expanded, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", ["dz", "input"])
def test_nan_and_infinity_go_where_they_go_in_torch(where: str, value: float) -> None:
    case = Case(Conv("conv", 32, 32, 3, 1, 12, n=2), torch.float32, prologue=False)
    case.dvar.zero_()
    getattr(case, where)[1, 3, 5, 6] = value
    dinput, dweight, *_ = case.backward()
    expected = case.backward(reference)
    for actual, theirs in ((dinput, expected[0]), (dweight, expected[1])):
        torch.testing.assert_close(
            actual.isfinite(), theirs.isfinite(), msg=lambda m: f"{where}: {m}"
        )
        torch.testing.assert_close(actual, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("algorithm", ["winograd4", "winograd2", AMX, "packed", "aten"])
def test_every_algorithm(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", algorithm)
    for conv in (
        Conv("cut-tiles", 144, 112, 3, 1, 7, n=40),
        Conv("a-tile-a-picture", 16, 32, 3, 1, 2, n=65),
        Conv("odd-channels", 12, 20, 3, 1, 6, n=2),
    ):
        for padding in (0, 1, 2):
            if conv.size + 2 * padding >= 3:
                Case(conv, torch.float32, padding=padding).check()


@pytest.mark.parametrize(
    ("conv", "padding"),
    [
        (Conv("phases-of-a-stride", 33, 40, 5, 3, 17, n=2), 2),
        (Conv("stride-beyond-the-kernel", 32, 32, 3, 4, 21, n=3), 1),
        (Conv("taps-outside", 32, 32, 3, 1, 2, n=9), 3),
        (Conv("whole-images", 48, 32, 3, 1, 5, n=70), 1),
        (Conv("whole-images-stride-2", 48, 32, 7, 2, 9, n=33), 3),
        (Conv("wide", 16, 20, 1, 2, 1100), 1),
        (Conv("pointwise", 24, 104, 1, 1, 71), 0),
        (Conv("pointwise-padded", 32, 32, 1, 2, 5, n=2), 1),
    ],
    ids=lambda value: str(value),
)
def test_weight_on_the_matrix_unit(
    conv: Conv, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", "amx")
    for prologue in (False, True):
        Case(conv, torch.float32, prologue=prologue, padding=padding).check()


@pytest.mark.parametrize("conv", WHOLE_CONVS, ids=str)
def test_same_bits_twice(conv: Conv) -> None:
    case = Case(conv, torch.float32)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            for got, want in zip(case.backward(), case.backward(), strict=True):
                assert_same_bits(got, want)
            case.check()
    finally:
        torch.set_num_threads(threads)


def _bad_arguments() -> Iterator[tuple[str, Callable[[], object]]]:
    x, z, weight = torch.randn(2, 6, 5, 5), torch.randn(2, 8, 5, 5), torch.randn(8, 6, 3, 3)
    six, eight = torch.ones(6), torch.ones(8)

    def call(
        dz=z, dmean=eight, dvar=eight, input=x, weight=weight, z=z, mean=eight,
        bn=(None, None, None, None), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1,
    ):  # fmt: skip
        return OPS.conv_stats_backward(
            dz, dmean, dvar, input, weight, z, mean, *bn, 1e-5, stride, padding, dilation, groups,
            True, True,
        )  # fmt: skip

    yield "dz", lambda: call(dz=z[:1])
    yield "dz", lambda: call(dz=z.double())
    yield "dmean", lambda: call(dmean=six)
    yield "dvar", lambda: call(dvar=eight.half())
    yield "input", lambda: call(input=x[0])
    yield "input", lambda: call(input=x.int())
    yield "weight", lambda: call(weight=weight[:, :5])
    yield "weight", lambda: call(weight=weight[0])
    yield "weight", lambda: call(weight=weight.bfloat16())
    yield "weight", lambda: call(weight=torch.randn(8, 6, 9, 9))
    yield "z", lambda: call(z=z[..., 1:])
    yield "z", lambda: call(z=z[:, 1:])
    yield "mean", lambda: call(mean=eight[:3])
    yield "in_mean", lambda: call(bn=(eight, six, None, None))
    yield "in_var", lambda: call(bn=(six, six.double(), None, None))
    yield "in_weight", lambda: call(bn=(six, six, eight, None))
    yield "in_bias", lambda: call(bn=(six, six, None, torch.ones(())))
    yield "in_mean and in_var", lambda: call(bn=(six, None, None, None))
    yield "in_weight", lambda: call(bn=(None, None, six, None))
    yield "stride", lambda: call(stride=(0, 1))
    yield "stride", lambda: call(stride=(1,))
    yield "padding", lambda: call(padding=(-1, 1))
    yield "dilation", lambda: call(dilation=(1, 0))
    yield "groups", lambda: call(groups=4)
    yield "groups", lambda: call(groups=0)


@pytest.mark.parametrize(("argument", "call"), list(_bad_arguments()))
def test_bad_arguments_are_named(argument: str, call: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=rf"fastres::conv_stats_backward: {argument} must be"):
        call()


@on_other_instruction_sets
def test_other_instruction_sets(isa: str) -> None:
    """The tests above on odd shapes, in a process of each other instruction set."""
    run_tests(__file__, "odd_shapes or layouts", isa)

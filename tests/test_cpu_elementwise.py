"""The CPU kernels of add_relu and bn_add_relu, and of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from cases import ODD_ACTIVATIONS, Activation
from fastres.ops import reference
from running import on_other_instruction_sets, run_python, run_tests
from tolerances import assert_within_twice

OPS = torch.ops.fastres
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RESNET_ACTIVATIONS = tuple(
    Activation(f"resnet-{c}x{size}", 1, c, size)
    for c, size in ((64, 56), (128, 28), (256, 14), (512, 7), (64, 32), (256, 8), (512, 4))
)
ACTIVATIONS = ODD_ACTIVATIONS + RESNET_ACTIVATIONS
RESIDUALS = ("none", "plain", "bn")
GRADIENTS = [
    "dz",
    "dmean",
    "dvar",
    "dweight",
    "dbias",
    "dresidual",
    "dresidual_mean",
    "dresidual_var",
    "dresidual_weight",
    "dresidual_bias",
]


def channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The values of `x` in every layout that an op may be given."""
    n, c, h, w = x.shape
    yield "channels_first", x.contiguous()
    wide = x.new_full((n, c + 3, h + 2, w + 1), float("nan"))
    wide = wide.contiguous(memory_format=torch.channels_last)
    wide[:, 2 : c + 2, 1 : h + 1, :w] = x
    yield "slice", wide[:, 2 : c + 2, 1 : h + 1, :w]
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)


class Case:
    """Arguments of bn_add_relu; `exact` is its result in float64, differentiable."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        residual: str,
        relu: bool = True,
        affine: bool = True,
    ) -> None:
        self.dtype, self.relu, self.eps, self.residual_eps = dtype, relu, 1e-5, 1e-3
        self.parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        channels = shape[1]

        def batch_norm(present: bool) -> list[Tensor | None]:
            if not present:
                return [None] * 4
            mean, weight, bias = torch.randn(3, channels).to(self.parameter_dtype)
            var = torch.rand(channels).to(self.parameter_dtype) + 0.5
            return [mean, var, *([weight, bias] if affine else [None, None])]

        self.z, self.dy = channels_last(shape, dtype), channels_last(shape, dtype)
        self.bn = batch_norm(True)
        self.residual = None if residual == "none" else channels_last(shape, dtype)
        self.residual_bn = batch_norm(residual == "bn")

    def forward(self, ops=OPS) -> Tensor:
        return ops.bn_add_relu(
            self.z, *self.bn, self.eps,
            self.residual, *self.residual_bn, self.residual_eps, self.relu,
        )  # fmt: skip

    def backward(self, y: Tensor, ops=OPS) -> tuple[Tensor, ...]:
        return ops.bn_add_relu_backward(
            self.dy, y, self.z, *self.bn[:3], self.eps,
            self.residual, *self.residual_bn[:3], self.residual_eps, self.relu,
        )  # fmt: skip

    def exact(self) -> tuple[Tensor, dict[str, Tensor]]:
        """y, and the gradients by name, of the formula in float64 by autograd."""
        tensors = [self.z, *self.bn, self.residual, *self.residual_bn]
        leaves = [None if t is None else t.double().clone().requires_grad_() for t in tensors]

        def batch_norm(x, mean, var, weight, bias, eps):
            y = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + eps)
            return y if weight is None else y * weight[:, None, None] + bias[:, None, None]

        y = batch_norm(*leaves[:5], self.eps)
        if leaves[6] is not None:
            y = y + batch_norm(*leaves[5:], self.residual_eps)
        elif leaves[5] is not None:
            y = y + leaves[5]
        y = torch.relu(y) if self.relu else y
        names = [name for name, leaf in zip(GRADIENTS, leaves, strict=True) if leaf is not None]
        gradients = torch.autograd.grad(
            y, [leaf for leaf in leaves if leaf is not None], self.dy.double()
        )
        return y.detach(), dict(zip(names, gradients, strict=True))


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_add_relu_is_torchs(activation: Activation, dtype: torch.dtype) -> None:
    a, b = channels_last(activation.shape, dtype), channels_last(activation.shape, dtype)
    y = OPS.add_relu(a, b)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(y, torch.relu(a + b))
    gradient = OPS.add_relu_backward(a, y)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(gradient, torch.ops.aten.threshold_backward(a, y, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu_special_values_are_torchs(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    tiny = torch.finfo(dtype).smallest_normal / 4
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, inf, -inf, nan, tiny, -tiny], dtype=dtype)
    a, b = (t.reshape(1, 3, 3, 9) for t in torch.meshgrid(values, values, indexing="ij"))
    y, want = OPS.add_relu(a, b), torch.relu(a + b)
    assert_same_bits(y, want)
    number = ~want.isnan()
    assert torch.equal(y.signbit()[number], want.signbit()[number])
    assert_same_bits(OPS.add_relu_backward(a, b), torch.ops.aten.threshold_backward(a, b, 0))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_bn_add_relu_against_float64(
    activation: Activation, dtype: torch.dtype, residual: str
) -> None:
    case = Case(activation.shape, dtype, residual)
    exact, exact_gradients = case.exact()
    y = case.forward()
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_within_twice(y, case.forward(reference), exact, "y")

    gradients = dict(zip(GRADIENTS, case.backward(y), strict=True))
    of_reference = dict(zip(GRADIENTS, case.backward(y, reference), strict=True))
    for name, gradient in gradients.items():
        if name not in exact_gradients:
            assert gradient.shape == (0,)
            continue
        assert gradient.dtype == (dtype if gradient.dim() == 4 else case.parameter_dtype)
        assert gradient.dim() == 1 or gradient.is_contiguous(memory_format=torch.channels_last)
        assert_within_twice(gradient, of_reference[name], exact_gradients[name], name)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_bn_add_relu_variants(residual: str, relu: bool, affine: bool) -> None:
    case = Case((2, 24, 5, 6), torch.float64, residual, relu, affine)
    exact, exact_gradients = case.exact()
    y = case.forward()
    torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)
    for name, gradient in zip(GRADIENTS, case.backward(y), strict=True):
        # Without an affine map there is no weight; the bias's gradient is the plain sum.
        if name in exact_gradients:
            torch.testing.assert_close(gradient, exact_gradients[name], rtol=1e-11, atol=1e-11)
        elif name not in ("dbias", "dresidual_bias") or (name != "dbias" and residual != "bn"):
            assert gradient.shape == (0,)


@pytest.mark.parametrize("residual", [False, True])
def test_gradient_through_the_statistics_is_batch_norms(residual: bool) -> None:
    z = torch.randn(4, 12, 5, 7, dtype=torch.float64, requires_grad=True)
    r = torch.randn_like(z, requires_grad=True)
    weight, bias = torch.randn(2, 12, dtype=torch.float64)
    dy = torch.randn_like(z)
    y = torch.nn.functional.batch_norm(z, None, None, weight, bias, training=True, eps=1e-5)
    y = torch.relu(y + r) if residual else torch.relu(y)
    want = torch.autograd.grad(y, [z, r] if residual else [z], dy)

    z, r = z.detach(), r.detach()
    var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    none = (None, None, None)
    got = OPS.bn_add_relu_backward(
        dy, y.detach(), z, mean, var, weight, 1e-5, r if residual else None, *none, 0.0, True
    )
    dz, dmean, dvar = got[:3]
    n = z.numel() / z.shape[1]
    column = (slice(None), None, None)
    total = dz + dmean[column] / n + dvar[column] * 2 * (z - mean[column]) / n
    torch.testing.assert_close(total, want[0], rtol=1e-10, atol=1e-10)
    if residual:
        torch.testing.assert_close(got[5], want[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_over_many_rows_stay_exact(dtype: torch.dtype) -> None:
    case = Case((128, 16, 32, 32), dtype, "bn")
    case.dy.add_(1)  # Sums with a mean: rounding errors of a running sum would pile up.
    _, exact = case.exact()
    y = case.forward()
    of_reference = dict(zip(GRADIENTS, case.backward(y, reference), strict=True))
    for name, gradient in zip(GRADIENTS, case.backward(y), strict=True):
        assert_within_twice(gradient, of_reference[name], exact[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 19, 5, 7), (1, 64, 8, 8)], ids=str)
def test_layouts_do_not_matter(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    case = Case(shape, dtype, "bn")
    y = case.forward()
    gradients = case.backward(y)
    sums = OPS.add_relu(case.z, case.residual)
    contents = case.z, case.residual, case.dy
    for forms in zip(*(layouts(t) for t in contents), strict=True):
        (case.z, case.residual, case.dy) = (tensor for _, tensor in forms)
        assert_same_bits(case.forward(), y)
        for got, want in zip(case.backward(y.contiguous()), gradients, strict=True):
            assert_same_bits(got, want)
        result = OPS.add_relu(case.z, case.residual)
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert_same_bits(result, sums)


def test_expanded_gradient() -> None:
    case = Case((2, 5, 4, 4), torch.float32, "plain")
    y = case.forward()
    case.dy = torch.ones(()).expand(2, 5, 4, 4)
    expanded = case.backward(y)
    case.dy = case.dy.contiguous()
    for got, want in zip(expanded, case.backward(y), strict=True):
        assert_same_bits(got, want)
    assert_same_bits(OPS.add_relu_backward(torch.ones(()).expand(2, 5, 4, 4), y), (y > 0).float())


def test_nan_and_infinity_pass() -> None:
    case = Case((1, 3, 2, 20), torch.float32, "plain")
    nan, inf = float("nan"), float("inf")
    case.z[0, 0, 0, :3] = torch.tensor([nan, inf, -inf])
    case.residual[0, 1, 1, :3] = torch.tensor([nan, inf, -inf])
    y = case.forward()
    assert_same_bits(y.isnan(), case.forward(reference).isnan())
    assert_same_bits(y.isinf(), case.forward(reference).isinf())
    assert y.isnan().sum() == 2
    assert not y[0, 2].isnan().any()
    dresidual = case.backward(y)[5]
    assert_same_bits(dresidual, case.dy.masked_fill(y <= 0, 0))


@pytest.mark.parametrize("shape", [(8, 64, 33, 31), (3, 1000, 20, 3)], ids=str)
def test_same_bits_every_time_and_for_every_number_of_threads(
    shape: tuple[int, int, int, int],
) -> None:
    case = Case(shape, torch.float32, "bn")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            y = case.forward()
            results.append((y, *case.backward(y)))
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        for got, want in zip(again, results[0], strict=True):
            assert_same_bits(got, want)


def _bad_arguments() -> Iterator[tuple[str, str, Callable[[], object]]]:
    x, vector = torch.randn(2, 6, 4, 4), torch.ones(6)
    none = (None, None, None, None)

    def forward(z=x, mean=vector, var=vector, weight=vector, bias=vector, residual=None, bn=none):
        return OPS.bn_add_relu(z, mean, var, weight, bias, 1e-5, residual, *bn, 1e-5, True)

    def backward(dy=x, y=x, z=x, mean=vector, residual=None, bn=none):
        return OPS.bn_add_relu_backward(
            dy, y, z, mean, vector, vector, 1e-5, residual, *bn[:3], 1e-5, True
        )

    yield "add_relu", "input", lambda: OPS.add_relu(x[0], x[0])
    yield "add_relu", "input", lambda: OPS.add_relu(x.int(), x.int())
    yield "add_relu", "residual", lambda: OPS.add_relu(x, x[:1])
    yield "add_relu", "residual", lambda: OPS.add_relu(x, x.double())
    yield "add_relu_backward", "y", lambda: OPS.add_relu_backward(x, x[:, :3])
    yield "bn_add_relu", "z", lambda: forward(z=x[0])
    yield "bn_add_relu", "z", lambda: forward(z=x.long())
    yield "bn_add_relu", "mean", lambda: forward(mean=vector[:5])
    yield "bn_add_relu", "var", lambda: forward(var=vector.double())
    yield "bn_add_relu", "weight", lambda: forward(weight=torch.ones(6, 1))
    yield "bn_add_relu", "bias", lambda: forward(bias=torch.ones(7))
    yield "bn_add_relu", "residual", lambda: forward(residual=x[..., :3])
    yield "bn_add_relu", "residual", lambda: forward(residual=x.half())
    yield "bn_add_relu", "residual", lambda: forward(bn=(vector,) * 4)
    yield "bn_add_relu", "residual_var", lambda: forward(residual=x, bn=(vector, *none[1:]))
    yield (
        "bn_add_relu",
        "residual_weight",
        lambda: forward(residual=x, bn=(*none[:2], vector, None)),
    )
    yield (
        "bn_add_relu",
        "residual_mean",
        lambda: forward(residual=x, bn=(vector[:1],) + (vector,) * 3),
    )
    yield "bn_add_relu_backward", "dy", lambda: backward(dy=x[:1])
    yield "bn_add_relu_backward", "y", lambda: backward(y=x.double())
    yield "bn_add_relu_backward", "z", lambda: backward(z=x[0, 0])
    yield "bn_add_relu_backward", "mean", lambda: backward(mean=vector[:0])
    yield "bn_add_relu_backward", "residual", lambda: backward(residual=x[:0])


@pytest.mark.parametrize(("op", "argument", "call"), list(_bad_arguments()))
def test_bad_arguments_are_named(op: str, argument: str, call: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=rf"fastres::{op}: {argument} must be"):
        call()


@on_other_instruction_sets
def test_other_instruction_sets(isa: str) -> None:
    """The tests above on odd shapes, in a process of each other instruction set."""
    run_tests(__file__, "not resnet and not many_rows", isa)


def test_unknown_instruction_set_is_an_error() -> None:
    run = run_python("import fastres._C as c; c.cpu_capability()", FASTRES_CPU_CAPABILITY="sse9")
    assert run.returncode != 0
    assert "must be baseline, avx2, avx512 or amx, got 'sse9'" in run.stderr

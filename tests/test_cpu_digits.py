"""Convolutions of kept weights on the matrix unit's bytes, against float64 and torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import _C
from fastres.backends import cpu
from fastres.ops import conv_bn_relu, pack_conv_weight
from tolerances import assert_within_twice, relative_error

pytestmark = pytest.mark.skipif(_C.cpu_capability() != "amx", reason="AMX is not in use")


@pytest.fixture(autouse=True)
def _digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", "digits")


@pytest.fixture(params=[1, 2], autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


class Case(NamedTuple):
    n: int
    c_in: int
    height: int
    width: int
    c_out: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1

    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        return [self.stride] * 2, [self.padding] * 2, [1, 1], 1

    def weight(self) -> Tensor:
        fan_in = self.c_in * self.kernel**2
        return torch.randn(self.c_out, self.c_in, *[self.kernel] * 2) * (2 / fan_in) ** 0.5

    def images(self) -> Tensor:
        x = torch.randn(self.n, self.c_in, self.height, self.width)
        return x.contiguous(memory_format=torch.channels_last)


def pack(case: Case, weight: Tensor) -> Tensor:
    return pack_conv_weight(weight, *case.geometry(), [case.n, case.height, case.width])


def digits_of(packed: Tensor) -> int:
    """How many digits the weights have, which their packed form begins with; 0 for none."""
    return int(packed[0])


def run(
    case: Case, x: Tensor, weight: Tensor, packed: Tensor, residual: Tensor | None = None
) -> Tensor:
    zeros, ones = torch.zeros(case.c_out), torch.ones(case.c_out)
    relu = residual is not None
    args = (x, weight, None, zeros, ones, None, None, 0.0, residual)
    return conv_bn_relu(*args, *case.geometry(), relu, packed)


def torch_result(
    case: Case, x: Tensor, weight: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """torch's own in float32, and the exact one."""

    def compute(dtype: torch.dtype) -> Tensor:
        y = F.conv2d(x.to(dtype), weight.to(dtype), None, case.stride, case.padding)
        return y if residual is None else F.relu(y + residual.to(dtype))

    return compute(torch.float32), compute(torch.float64)


CASES = [
    Case(1, 512, 4, 4, 512),
    Case(1, 512, 7, 7, 512),
    Case(3, 512, 7, 7, 40),
    Case(1, 256, 8, 8, 256),
    Case(1, 256, 14, 14, 256),
    Case(2, 64, 56, 56, 64),
    Case(5, 33, 9, 13, 17),
    Case(2, 100, 11, 5, 48, stride=2),
    Case(3, 130, 6, 6, 31, padding=0),
    Case(33, 320, 5, 1, 16, stride=2),
    Case(40, 64, 1, 1, 16),
    Case(2, 48, 12, 12, 32, kernel=5, padding=2),
    Case(2, 32, 12, 12, 32, kernel=2, padding=0, stride=2),
    Case(70, 96, 3, 3, 96),
    Case(1, 64, 3, 90, 64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_torch(case: Case) -> None:
    torch.manual_seed(0)
    x, weight = case.images(), case.weight()
    packed = pack(case, weight)
    assert digits_of(packed) == 3
    torch_y, exact = torch_result(case, x, weight)
    actual = run(case, x, weight, packed)
    assert_within_twice(actual, torch_y, exact)
    assert run(case, x, weight, packed).equal(actual)
    residual = torch.randn_like(actual)
    torch_y, exact = torch_result(case, x, weight, residual)
    assert_within_twice(run(case, x, weight, packed, residual), torch_y, exact)


def test_more_exact_than_torch() -> None:
    """Its products are exact, as no float32's are: what is left is the numbers' rounding."""
    torch.manual_seed(0)
    case = Case(1, 512, 7, 7, 512)
    x, weight = case.images(), case.weight()
    exact = torch_result(case, x, weight)[1]
    assert relative_error(run(case, x, weight, pack(case, weight)), exact) < 2**-22


def test_slices_and_other_layouts() -> None:
    torch.manual_seed(0)
    case = Case(2, 40, 10, 10, 24)
    weight = case.weight()
    packed = pack(case, weight)
    wide = torch.randn(2, 60, 20, 10).contiguous(memory_format=torch.channels_last)
    for x in (wide[:, 7:47, ::2], wide.contiguous()[:, 7:47, ::2]):
        torch_y, exact = torch_result(case, x, weight)
        assert_within_twice(run(case, x, weight, packed), torch_y, exact)
    assert run(case, wide[:0, 7:47, ::2], weight, packed).shape == (0, 24, 10, 10)


def test_digits_that_weights_need() -> None:
    """Four where three would be too coarse, none where all would."""
    torch.manual_seed(0)
    case = Case(1, 64, 14, 14, 64)
    x = case.images()
    spread = case.weight() ** 7
    outlier = case.weight()
    outlier[5] *= 1e-3
    outlier[5, 3, 1, 1] = 1.0
    far = case.weight()
    far[5] *= 1e-9
    far[5, 3, 1, 1] = 1.0
    lone = case.weight()
    lone[7] = 0.0
    for weight, digits in ((spread, 4), (outlier, 4), (far, 3), (lone, 3), (case.weight() * 0, 3)):
        packed = pack(case, weight)
        assert digits_of(packed) == digits
        torch_y, exact = torch_result(case, x, weight)
        assert_within_twice(run(case, x, weight, packed), torch_y, exact)
    for value in (float("nan"), float("inf"), 3e38):
        weight = case.weight()
        weight[5, 3, 1, 1] = value
        packed = pack(case, weight)
        assert digits_of(packed) == 0
        torch_y = torch_result(case, x, weight)[0]
        torch.testing.assert_close(run(case, x, weight, packed), torch_y, equal_nan=True)


def test_weak_channels_keep_their_digits() -> None:
    """An input channel's small weights count as much as its numbers are large."""
    torch.manual_seed(0)
    case = Case(2, 64, 14, 14, 64)
    x, weight = case.images(), case.weight()
    x[:, ::2] *= 2**20
    weight[:, ::2] *= 2**-20
    x[:, 5] *= 1e-8
    weight[:, 5] *= 1e8
    packed = pack(case, weight)
    torch_y, exact = torch_result(case, x, weight)
    assert_within_twice(run(case, x, weight, packed), torch_y, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30, 3e38], ids=str)
def test_what_is_far_from_the_rest(value: float) -> None:
    """As torch has it, in the pixels beside too: such an image is left to another algorithm."""
    torch.manual_seed(0)
    case = Case(3, 64, 14, 14, 64)
    x, weight = case.images(), case.weight()
    x[1, 5, 3, 4] = value
    actual = run(case, x, weight, pack(case, weight))
    torch_y = torch_result(case, x, weight)[0]
    torch.testing.assert_close(actual, torch_y, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-30, 1e-12, 1e12, 1e30], ids=str)
def test_images_of_any_size(scale: float) -> None:
    """Each by its own measure, though they share tiles."""
    torch.manual_seed(0)
    case = Case(6, 512, 4, 4, 64)
    x, weight = case.images(), case.weight()
    x[1::2] *= scale
    actual = run(case, x, weight, pack(case, weight))
    torch_y, exact = torch_result(case, x, weight)
    for n in range(case.n):
        assert_within_twice(actual[n], torch_y[n], exact[n])


def test_not_where_every_call_may_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    """As graphs do, which know no size: digits take longer to make than they save once."""
    weight = torch.randn(64, 64, 3, 3)
    geometry = [1, 1], [1, 1], [1, 1], 1
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", "amx")
    amx = pack_conv_weight(weight, *geometry)
    monkeypatch.delenv("FASTRES_CPU_ALGORITHM")
    assert pack_conv_weight(weight, *geometry).equal(amx)
    assert pack_conv_weight(weight, *geometry, [1, 14, 14]).numel() != amx.numel()


def test_only_for_kept_weights() -> None:
    """Packing for one call takes longer than it saves; training and bfloat16 have others."""
    sizes = (1, 64, 14, 14), (64, 64, 3, 3)
    assert cpu.conv_algorithm(*sizes, padding=1) == "digits"
    assert cpu.conv_algorithm(*sizes, padding=1, training=True) == "amx"
    assert cpu.conv_algorithm(*sizes, padding=1, dtype=torch.bfloat16) != "digits"
    assert cpu.conv_algorithm((1, 64, 14, 14), (64, 64, 1, 1)) != "digits"
    assert cpu.conv_algorithm((1, 16, 14, 14), (64, 16, 3, 3), padding=1) != "digits"
    case = Case(1, 64, 14, 14, 64)
    weight = case.weight()
    # Its bytes, as floats, may be NaN.
    packed = pack(case, weight).view(torch.int32)
    again = pack(case, weight.contiguous(memory_format=torch.channels_last)).view(torch.int32)
    assert again.equal(packed)

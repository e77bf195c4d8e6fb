"""The same answers from every number of threads, from many Python threads, and after a fork."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastres
from cases import Conv
from fastres import _C, ops
from fastres.backends import cpu
from running import in_threads, run_python
from tolerances import relative_error

CONVS = (
    Conv("winograd", 64, 64, 3, 1, 29, n=3),
    Conv("winograd-256", 256, 256, 3, 1, 14),
    Conv("few-pixels", 64, 96, 3, 1, 4, n=2),
    Conv("stride-2", 48, 80, 3, 2, 21, n=2),
    Conv("1x1", 96, 40, 1, 1, 19, n=2),
    Conv("1x1-stride-2", 64, 128, 1, 2, 15, n=2),
    Conv("stem", 3, 64, 7, 2, 65, n=2),
)
# Between two orders of the same float32 sums, relative in the Euclidean norm.
TOLERANCE = 3e-6


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small_model() -> fastres.ResNet:
    torch.manual_seed(0)
    return fastres.resnet18(fused=True, stem="cifar", num_classes=10)


def inference(case: Conv) -> list[Tensor]:
    x = torch.randn(case.n, case.c_in, case.size, case.size)
    weight = torch.randn(case.c_out, case.c_in, case.kernel, case.kernel)
    geometry = ([case.stride] * 2, [case.padding] * 2, [1, 1], 1)
    mean, var = torch.randn(case.c_out), torch.rand(case.c_out) + 0.5
    residual = torch.randn(case.n, case.c_out, case.out, case.out)
    packed = ops.pack_conv_weight(weight, *geometry, [case.n, case.size, case.size])
    return [
        ops.conv_bn_relu(
            x, weight, None, mean, var, None, None, 1e-5, residual, *geometry, True, given
        )
        for given in (packed, None)
    ]


def training(case: Conv) -> list[Tensor]:
    """Statistics and gradients of a convolution with its prologue."""
    x = torch.randn(case.n, case.c_in, case.size, case.size, requires_grad=True)
    weight = torch.randn(case.c_out, case.c_in, case.kernel, case.kernel, requires_grad=True)
    vectors = [torch.rand(case.c_in).add(0.5).requires_grad_() for _ in range(4)]
    geometry = ([case.stride] * 2, [case.padding] * 2, [1, 1], 1)
    z, mean, var = ops.conv_stats(x, weight, *vectors, 1e-5, *geometry)
    ((z * torch.randn_like(z)).sum() + mean.sum() + var.sum()).backward()
    return [z, mean, var, x.grad, weight.grad, *(v.grad for v in vectors)]


def with_threads(count: int, compute: Callable[..., list[Tensor]], *args: object) -> list[Tensor]:
    torch.set_num_threads(count)
    torch.manual_seed(0)
    return [t.detach() for t in compute(*args)]


@pytest.mark.parametrize("compute", [inference, training])
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_every_number_of_threads(case: Conv, compute: Callable[[Conv], list[Tensor]]) -> None:
    alone = with_threads(1, compute, case)
    for count in (1, 2, 3):
        results = with_threads(count, compute, case)
        again = with_threads(count, compute, case)
        for a, b, c in zip(results, again, alone, strict=True):
            assert a.equal(b)
            assert relative_error(a, c.double()) < TOLERANCE


@pytest.mark.skipif(_C.cpu_capability() == "baseline", reason="torch's kernels are the faster ones")
@pytest.mark.skipif("FASTRES_CPU_ALGORITHM" in os.environ, reason="it names the algorithm")
def test_winograd_computes_the_cases_of_its_name() -> None:
    for case in CONVS[:2]:
        sizes = (case.n, case.c_in, case.size, case.size), (case.c_out, case.c_in, 3, 3)
        for train in (False, True):
            algorithm = cpu.conv_algorithm(*sizes, padding=1, training=train)
            assert algorithm.startswith("winograd") or algorithm in ("digits", "amx")


def training_step() -> list[Tensor]:
    model = small_model().train()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    return [loss, *(g for g in gradients if g is not None), *model.buffers()]


def test_a_training_step_of_a_model() -> None:
    alone = with_threads(1, training_step)
    for count in (1, 2, 3):
        results = with_threads(count, training_step)
        again = with_threads(count, training_step)
        assert all(a.equal(b) for a, b in zip(results, again, strict=True))
        assert relative_error(results[0], alone[0].double()) < 1e-4


def test_eight_threads_share_a_model() -> None:
    model = small_model().eval()
    inputs = [torch.randn(1 + i % 3, 3, 32, 32) for i in range(8)]

    def right(i: int) -> bool:
        with torch.inference_mode():
            return all(model(inputs[i]).equal(expected[i]) for _ in range(5))

    with torch.inference_mode():
        expected = [model(x) for x in inputs]
    model.eval()  # the threads pack the weights once more, all at once
    assert not in_threads(8, right)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_model_in_the_workers_of_a_data_loader() -> None:
    script = """
import torch
import fastres

torch.set_num_threads(2)
torch.manual_seed(0)
model = fastres.resnet18(fused=True, stem="cifar", num_classes=10).eval()
images = torch.randn(8, 3, 32, 32)


class Predictions(torch.utils.data.Dataset):
    def __len__(self):
        return len(images)

    def __getitem__(self, i):
        with torch.inference_mode():
            return model(images[i : i + 1])[0].clone()


with torch.inference_mode():
    expected = torch.cat([model(x[None]) for x in images])  # with threads, before the fork
loader = torch.utils.data.DataLoader(
    Predictions(), batch_size=2, num_workers=2, multiprocessing_context="fork"
)
for _ in range(2):
    torch.testing.assert_close(torch.cat(list(loader)), expected, rtol=1e-4, atol=1e-4)
"""
    run = run_python(script)
    assert run.returncode == 0, run.stderr

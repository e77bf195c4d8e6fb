"""The memory that the CPU kernels keep between calls."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from algorithms import AMX, DIGITS

from fastres import _C, ops
from fastres.models.resnet import FusedBasicBlock, FusedBottleneck
from running import in_threads, run_python

LARGE = (4, 64, 64, 64)  # 4 MB
gives_memory_away = pytest.mark.skipif(
    tuple(int(i) for i in torch.__version__.split(".")[:2]) < (2, 11),
    reason="torch 2.10 takes no memory with a deleter",
)


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    before = _C.set_kept_memory_limit(0)  # begin with nothing kept
    _C.set_kept_memory_limit(64 << 20)
    yield
    _C.set_kept_memory_limit(before)


def large(value: float = 1.0) -> torch.Tensor:
    x = torch.full(LARGE, value).contiguous(memory_format=torch.channels_last)
    return ops.add_relu(x, x)


@gives_memory_away
def test_freed_memory_serves_the_next_result() -> None:
    y = large()
    address = y.data_ptr()
    assert address % 64 == 0 and y.is_contiguous(memory_format=torch.channels_last)
    view = y[1:, :3]
    del y
    other = large(3.0)  # while a view is alive, its memory is not given to another
    assert other.data_ptr() != address and (view == 2).all()
    del view
    assert large().data_ptr() == address
    assert (other == 6).all()


@gives_memory_away
def test_a_thread_takes_what_it_gave_back() -> None:
    """Another's may be in the cache of another core, though it is newer."""
    kept: dict[str, torch.Tensor] = {}
    with ThreadPoolExecutor(1) as other:
        kept["own"], kept["other"] = large(), other.submit(large).result()
        own, others = kept["own"].data_ptr(), kept["other"].data_ptr()
        del kept["own"]
        other.submit(kept.__delitem__, "other").result()
        again = large()
        assert again.data_ptr() == own
        assert other.submit(large).result().data_ptr() == others


def test_limit() -> None:
    assert _C.set_kept_memory_limit(1 << 20) == 64 << 20
    assert _C.kept_memory_limit() == 1 << 20
    for _ in range(3):
        assert (large() == 2).all()
    _C.set_kept_memory_limit(0)
    assert (large() == 2).all()


@gives_memory_away
def test_no_more_than_the_limit_is_kept() -> None:
    script = """
import resource, torch
from fastres import _C, ops
_C.set_kept_memory_limit(32 << 20)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
x = torch.ones(1, 64, 512, 512).contiguous(memory_format=torch.channels_last)  # 64 MB
for size in range(64, 512, 16):
    part = x[..., :size, :size].contiguous(memory_format=torch.channels_last)
    ops.add_relu(part, part)
    if size == 256: before = peak()
assert peak() - before < 300 << 20, (before, peak())
"""
    run = run_python(script)
    assert run.returncode == 0, run.stderr


@gives_memory_away
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_memory_goes_back_to_the_system_with_its_last_block() -> None:
    """Small results share mappings, large ones have their own."""
    script = """
import resource, torch
from fastres import _C, ops
_C.set_kept_memory_limit(1 << 30)
def resident(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
small = torch.ones(1, 64, 40, 40).contiguous(memory_format=torch.channels_last)  # 0.4 MB
large = torch.ones(1, 64, 160, 160).contiguous(memory_format=torch.channels_last)  # 6.6 MB
ops.add_relu(small, small), ops.add_relu(large, large)
_C.set_kept_memory_limit(0)
_C.set_kept_memory_limit(1 << 30)
before = resident()
results = [ops.add_relu(x, x) for x in [small, large] * 40]
assert resident() - before > 260 << 20
one = results[40]
assert all(bool((y == 2).all()) for y in results)
del results
_C.set_kept_memory_limit(0)
assert resident() - before < 30 << 20, (before, resident())
assert bool((one == 2).all())
"""
    run = run_python(script)
    assert run.returncode == 0, run.stderr


@gives_memory_away
def test_packed_weights_are_not_given_to_another() -> None:
    weight = torch.randn(64, 64, 3, 3)
    packed = ops.pack_conv_weight(weight, [1, 1], [1, 1], [1, 1]).view(torch.int32)
    copy = packed.clone()
    _C.set_kept_memory_limit(0)
    _C.set_kept_memory_limit(64 << 20)
    for _ in range(20):
        assert large().data_ptr() != packed.data_ptr()
    assert packed.equal(copy)


def test_results_of_many_threads() -> None:
    def right(i: int) -> bool:
        return all(bool((large(i + 1.0) == 2 * (i + 1.0)).all()) for _ in range(20))

    assert not in_threads(4, right)


def network(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What blocks with and without a shortcut's convolution give, in eval and train mode, with
    results of more than 2 MB and of sizes that no tile divides."""
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", algorithm)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        FusedBottleneck(32, 16, downsample=shortcut(32, 64)),
        FusedBasicBlock(64, 64),
        FusedBasicBlock(64, 128, stride=2, downsample=shortcut(64, 128, stride=2)),
    ).to(memory_format=torch.channels_last)
    x = torch.randn(3, 32, 97, 75).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        results = [model.eval()(x)]
    results.append(model.train()(x.requires_grad_()))
    results[-1].square().mean().backward()
    results += [ops.add_relu(x, x).detach()]
    assert x.grad is not None
    return results + [x.grad] + [p.grad for p in model.parameters() if p.grad is not None]


def shortcut(inputs: int, outputs: int, stride: int = 1) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(inputs, outputs, 1, stride, bias=False), torch.nn.BatchNorm2d(outputs)
    )


@pytest.mark.parametrize("algorithm", [AMX, DIGITS, "winograd4", "packed"])
def test_streamed_results(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large results in kept memory are written past the caches: the bits are the same."""
    _C.set_kept_memory_limit(1 << 30)
    streamed = network(algorithm, monkeypatch)
    _C.set_kept_memory_limit(0)
    plain = network(algorithm, monkeypatch)
    assert len(streamed) > 20
    for a, b in zip(streamed, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_computes() -> None:
    script = """
import os, torch
from fastres import ops
torch.set_num_threads(1)
x = torch.ones(4, 64, 64, 64).contiguous(memory_format=torch.channels_last)
y = ops.add_relu(x, x)
child = os.fork()
if child == 0:
    z = ops.add_relu(y, y)
    os._exit(0 if bool((z == 4).all()) else 1)
assert os.waitpid(child, 0)[1] == 0
assert bool((y == 2).all())
"""
    run = run_python(script)
    assert run.returncode == 0, run.stderr


def test_a_setting_that_is_no_number() -> None:
    script = """
import torch
from fastres import ops
x = torch.ones(4, 64, 64, 64)
ops.add_relu(x, x)
"""
    run = run_python(script, FASTRES_CPU_KEEP_MB="lots")
    assert run.returncode == 1
    assert "FASTRES_CPU_KEEP_MB must be a number of megabytes, got 'lots'" in run.stderr

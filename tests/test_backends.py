"""fastres.backends.cpu: allow_winograd, conv_algorithm, and the log of what was chosen."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastres
from cases import ODD_CONVS, RESNET_CONVS
from fastres import env, ops
from fastres.backends import cpu
from running import run_python
from tolerances import relative_error

GEOMETRY = ([1, 1], [1, 1], [1, 1], 1)
SHAPES = ((2, 32, 20, 20), (48, 32, 3, 3))
STEM = ((2, 3, 30, 30), (64, 3, 7, 7))


@pytest.fixture(autouse=True)
def flag(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FASTRES_CPU_ALGORITHM", raising=False)
    yield
    cpu.allow_winograd = True


def test_the_flag() -> None:
    assert fastres.backends.cpu.allow_winograd is True
    fastres.backends.cpu.allow_winograd = False
    assert cpu.allow_winograd is False
    with cpu.flags(allow_winograd=True):
        assert cpu.allow_winograd is True
        with cpu.flags(allow_winograd=False):
            assert cpu.allow_winograd is False
        assert cpu.allow_winograd is True
    assert cpu.allow_winograd is False
    with pytest.raises(ValueError, match="inside"), cpu.flags(allow_winograd=True):
        raise ValueError("inside")
    assert cpu.allow_winograd is False


@pytest.mark.parametrize("value", [None, 0, 1, "False"])
def test_a_flag_that_is_no_bool(value: object) -> None:
    with pytest.raises(TypeError, match="allow_winograd must be True or False, got"):
        cpu.allow_winograd = value
    with (
        pytest.raises(TypeError, match="allow_winograd must be True or False, got"),
        cpu.flags(allow_winograd=value),
    ):
        pass
    assert cpu.allow_winograd is True


def inference(packed: Tensor | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    x, weight = (torch.randn(shape) for shape in SHAPES)
    vectors = (torch.zeros(48), torch.ones(48), None, None)
    return [ops.conv_bn_relu(x, weight, None, *vectors, 0.0, None, *GEOMETRY, False, packed)]


def packed_inference() -> list[Tensor]:
    """With the weights in Winograd's form, packed before it was forbidden."""
    torch.manual_seed(0)
    _, weight = (torch.randn(shape) for shape in SHAPES)
    with cpu.flags(allow_winograd=True), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTRES_CPU_ALGORITHM", "winograd4")
        packed = ops.pack_conv_weight(weight, *GEOMETRY)
    return inference(packed)


def training() -> list[Tensor]:
    torch.manual_seed(0)
    x, weight = (torch.randn(shape, requires_grad=True) for shape in SHAPES)
    z, mean, var = ops.conv_stats(x, weight, None, None, None, None, 0.0, *GEOMETRY)
    ((z * torch.randn_like(z)).sum() + mean.sum() + var.sum()).backward()
    return [z, mean, var, x.grad, weight.grad]


@pytest.mark.parametrize("compute", [inference, packed_inference, training])
def test_winograd_is_not_used(
    compute: Callable[[], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", "winograd4")
    with_winograd = compute()
    with cpu.flags(allow_winograd=False):
        without = compute()
        instead = cpu.conv_algorithm(*SHAPES, padding=1, training=compute is training)
    again = compute()
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", instead)
    expected = compute()
    for a, b, c, d in zip(without, expected, with_winograd, again, strict=True):
        assert a.equal(b)
        assert d.equal(c)
        assert not a.equal(c)


def small_model() -> fastres.ResNet:
    torch.manual_seed(0)
    return fastres.resnet18(fused=True, stem="cifar", num_classes=10).eval()


def test_a_model_keeps_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    packings = []
    pack = ops.pack_conv_weight
    monkeypatch.setattr(ops, "pack_conv_weight", lambda *a: packings.append(a) or pack(*a))
    model, x = small_model(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        with_winograd = model(x)
        with cpu.flags(allow_winograd=False):
            without = model(x)
            fresh = small_model()(x)
        assert without.equal(fresh)
        assert relative_error(without, with_winograd.double()) < 1e-5
        before = len(packings)
        assert model(x).equal(with_winograd)
        with cpu.flags(allow_winograd=False):
            assert model(x).equal(without)
        assert len(packings) == before


def test_a_frozen_torchscript_model_obeys() -> None:
    model, x = small_model(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        frozen = torch.jit.freeze(torch.jit.trace(model, x, check_trace=False))
        with cpu.flags(allow_winograd=False):
            assert relative_error(frozen(x), model(x).double()) < 1e-5


def test_the_algorithm_of_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.conv_algorithm(*SHAPES, dtype=torch.float64) == "aten"
    assert cpu.conv_algorithm((1, 32, 9, 9), (32, 16, 3, 3), groups=2) == "aten"
    assert cpu.conv_algorithm((1, 32, 9, 9), (32, 32, 3, 3), dilation=2) == "aten"
    for name in ("winograd4", "winograd2", "packed", "aten"):
        monkeypatch.setenv("FASTRES_CPU_ALGORITHM", name)
        for training in (False, True):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                call = {"dtype": dtype, "training": training, "padding": (1, 1)}
                assert cpu.conv_algorithm(*SHAPES, **call) == name
                stem = cpu.conv_algorithm(*STEM, stride=2, **call)
                assert (stem == name) == (name != "winograd2")
                if name.startswith("winograd"):
                    assert cpu.conv_algorithm(*SHAPES, stride=[2, 2], **call) == name
                    assert cpu.conv_algorithm(*SHAPES, stride=[1, 2], **call) != name
                    with cpu.flags(allow_winograd=False):
                        assert not cpu.conv_algorithm(*SHAPES, **call).startswith("winograd")


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("input_size", {"input_size": (2, 32, 20)}),
        ("input_size", {"input_size": (0, 32, 20, 20)}),
        ("weight_size", {"weight_size": (48, 32, 3)}),
        ("weight", {"weight_size": (48, 16, 3, 3)}),
        ("input", {"input_size": (2, 32, 2, 2)}),
        ("stride", {"stride": 0}),
        ("padding", {"padding": (1, -1)}),
        ("dilation", {"dilation": (1, 1, 1)}),
        ("groups", {"groups": 3}),
        ("dtype", {"dtype": torch.int32}),
    ],
)
def test_bad_arguments_are_named(argument: str, call: dict) -> None:
    sizes = {"input_size": SHAPES[0], "weight_size": SHAPES[1]}
    with pytest.raises(RuntimeError, match=f"fastres::conv_algorithm: {argument} must"):
        cpu.conv_algorithm(**{**sizes, **call})


def test_env_shows_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with cpu.flags(allow_winograd=False):
        rows = env.convolutions()
        env.main()
    shown = capsys.readouterr().out
    assert "fastres.backends.cpu.allow_winograd = False" in shown
    for row in rows:
        assert len(row.inference) == len(row.training) == len(env.BATCHES)
        assert set(row.inference + row.training) <= {"digits", "amx", "packed", "aten"}
    page = (Path(__file__).parent.parent / "docs" / "settings.md").read_text(encoding="utf-8")
    for variable in env.VARIABLES:
        assert variable in shown and f"| `{variable}` |" in page


def run_logging(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_python(script, **{"FASTRES_LOG": "conv", **variables})


def logged(run: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in run.stderr.splitlines() if line.startswith("fastres: ")]


LINE = re.compile(
    r"fastres: (?P<op>\S+) (?P<dtype>\w+) input \((?P<input>[\d, ]+)\) weight \((?P<weight>[\d, ]+)"
    r"\) stride (?P<stride>\dx\d) padding (?P<padding>\dx\d).*, (?P<threads>\d+) threads"
    r" -> (?P<algorithm>\w+): (?P<reason>.+)"
)


def test_the_log_says_what_conv_algorithm_says() -> None:
    convs = [c.at(min(c.size, 30)).batch(2) for c in (*RESNET_CONVS[::3], *ODD_CONVS) if c.n]
    script = f"""
import torch
from fastres import nn, ops
from fastres.nn import packed
torch.set_num_threads(1)
for ci, co, k, s, size in {[(c.c_in, c.c_out, c.kernel, c.stride, c.size) for c in convs]}:
    geometry = ([s, s], [k // 2, k // 2], [1, 1], 1)
    x, weight, zeros, ones = torch.randn(2, ci, size, size), torch.randn(co, ci, k, k), torch.zeros(co), torch.ones(co)
    kept = ops.pack_conv_weight(weight, *geometry, [2, size, size])
    for _ in range(2):
        ops.conv_stats(x, weight, None, None, None, None, 0.0, *geometry)
        ops.conv_bn_relu(x, weight, None, zeros, ones, None, None, 0.0, None, *geometry, True, kept)
"""  # noqa: E501
    run = run_logging(script)
    assert run.returncode == 0, run.stderr
    lines = logged(run)
    assert len(lines) == len(set(lines)) == 2 * len(dict.fromkeys(str(c) for c in convs))
    for line in lines:
        found = LINE.fullmatch(line)
        assert found is not None, line
        sizes = [[int(i) for i in found[name].split(", ")] for name in ("input", "weight")]
        pairs = [[int(i) for i in found[name].split("x")] for name in ("stride", "padding")]
        dtype = getattr(torch, found["dtype"])
        expected = cpu.conv_algorithm(
            *sizes, *pairs, dtype=dtype, training=found["op"] == "conv_stats"
        )
        assert (found["algorithm"], found["threads"]) == (expected, "1"), line


def test_the_log_under_torchscript_and_of_gradients() -> None:
    script = """
import torch, fastres
model, x = fastres.resnet18(fused=True, stem="cifar"), torch.randn(2, 3, 16, 16)
model(x).sum().backward()
with torch.no_grad():
    traced = torch.jit.trace(model.eval(), x, check_trace=False)
print("traced")
with fastres.backends.cpu.flags(allow_winograd=False), torch.no_grad():
    traced(x)
"""
    run = run_logging(script)
    assert run.returncode == 0, run.stderr
    for op in (
        "conv_stats float32",
        "conv_stats_backward, gradient of the input, float32",
        "conv_stats_backward, gradient of the weight, float32",
        "conv_bn_relu float32",
    ):
        assert f"fastres: {op} input (2, " in run.stderr
    assert "(allow_winograd is False)" in run.stderr


def test_no_log_where_nobody_asks_and_an_error_for_another_value() -> None:
    script = """
import torch
from fastres import ops
ops.conv_stats(torch.randn(2, 4, 9, 9), torch.randn(8, 4, 3, 3), None, None, None, None, 0.0,
               [1, 1], [1, 1], [1, 1], 1)
"""
    run = run_logging(script, FASTRES_LOG="")
    assert (run.returncode, logged(run)) == (0, [])
    run = run_logging(script, FASTRES_LOG="all")
    assert run.returncode == 1
    assert "FASTRES_LOG must be conv, got 'all'" in run.stderr

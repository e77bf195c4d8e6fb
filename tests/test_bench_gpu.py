"""The GPU's bench where there is none: its clockwork, its sums and its table."""

import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import gpu  # noqa: E402
import roofline  # noqa: E402
import workloads  # noqa: E402

CEILINGS = roofline.Ceilings(1e12, 1e10, "a test")


def python(code):
    return [sys.executable, "-c", code]


def test_a_step_in_time():
    ended = gpu.run_step(python("print('done'); raise SystemExit(3)"), limit=300)
    assert (ended.code, ended.interrupted, ended.output) == (3, False, "done\n")


POLITE = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('kept')"
STUBBORN = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(600)"


@pytest.mark.parametrize(("code", "limit", "grace"), [(POLITE, 1, 300), (STUBBORN, 1, 0.1)])
def test_a_step_out_of_time_is_interrupted_then_ended(code, limit, grace):
    ended = gpu.run_step(python(code), limit, grace)
    assert ended.interrupted
    assert ended.seconds < 300


def test_tests_are_counted():
    assert gpu.counts_of("x\n3 failed, 10 passed, 2 skipped in 5.00s\n") == {
        "failed": 3,
        "passed": 10,
        "skipped": 2,
    }
    assert gpu.counts_of("1 passed, 2 errors in 1s") == {"passed": 1, "error": 2}
    assert gpu.counts_of("nothing") == {}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_distances_of_a_model(training):
    record = gpu.distance_record(workloads.QUICK, training, CEILINGS, "cpu", passes=1)
    works = roofline.work_of_model(workloads.QUICK, training, gpu.AMP)
    assert record["roofline"] == pytest.approx(sum(map(CEILINGS.seconds, works)))
    assert record["distance"] == pytest.approx(record["seconds"] / record["roofline"])
    lines = record["kernels"]
    excess = [line["excess"] for line in lines]
    assert excess == sorted(excess, reverse=True)
    if training:
        assert [line["calls"] for line in lines if line["op"] == "_fused_sgd_"] == [1]
    # Every convolution of the roofline is timed, as often as it is there.
    for op in ("conv_stats", "conv_stats_backward") if training else ("conv_bn_relu",):
        expected = {w.shape for w in works if w.op == op}
        found = [line for line in lines if line["op"] == op]
        assert {line["shape"] for line in found} == expected
        for line in found:
            assert line["distance"] == pytest.approx(line["seconds"] / line["roofline"])
            assert len(line["kernels"]) in (1, 2)


def record(suite, case, **figures):
    return {"suite": suite, "case": case, **figures}


def test_figures_beside_their_targets():
    records = [
        record("gpu-train", "resnet50-224px-n256", ratio=1.3),
        record("gpu-train", "cifar-resnet18-32px-n512", ratio=1.29),
        record("gpu-infer", "resnet18-224px-n1", ratio=None),
        record("memory", "resnet50-224px-n256", ratio=1.0, ratio_eager=1.7),
        record("ops", "bn_add_relu n256-256x56", share_of_peak=0.91),
        record("ops", "add_relu backward n256-256x56", share_of_peak=0.89),
        record("ops", "conv_stats forward imagenet-1x1", share_of_peak=0.1),
    ]
    found = gpu.against_targets(records)
    assert [row[4] for row in found] == [True, False, False, True, True, False]
    assert found[0] == ("gpu-train", "resnet50-224px-n256", "1.30", "1.25", True)
    assert found[2][2:4] == ("none", "1.10")
    distance = {"op": "conv_stats", "shape": "a shape", "excess": 0.002, "distance": 3.0}
    records += [
        record("gpu-tests", "tests", code=0, counts={"passed": 7}),
        record("gpu-distance", "a model", seconds=0.01, distance=2.0, kernels=[distance]),
    ]
    console = Console(width=130, record=True, file=io.StringIO())
    gpu.show(records, ["ops"], console)
    text = console.export_text()
    for part in (
        "7 passed",
        "missed",
        "2.00 x the roofline",
        "2 ms over, 3.0 x",
        "out of time: ops",
    ):
        assert part in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_without_a_gpu(capsys):
    assert gpu.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.parse(["--minutes", "0"])

"""The GPU's bench where there is none: its clockwork, its sums and its table."""

import io
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

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
    parts = "1 failed, 2 passed in 1.00s\n...\n3 passed, 9 deselected in 2.00s (0:00:02)\n"
    assert gpu.counts_of(parts) == {"failed": 1, "passed": 5}
    assert gpu.counts_of("nothing") == {}


def test_tests_run_in_parts_side_by_side(monkeypatch):
    commands = []

    def run_step(command, limit):
        commands.append(command)
        part = int(command[-1].removeprefix("--part=").split("/")[0])
        return gpu.Ended(part == 2, part == 3, float(part), f"{part} passed in 1s")

    monkeypatch.setattr(gpu, "run_step", run_step)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 6)
    ended = gpu.run_tests(5.0)
    assert sorted(command[-1] for command in commands) == [f"--part={i}/3" for i in (1, 2, 3)]
    assert (ended.code, ended.interrupted, ended.seconds) == (1, True, 3.0)
    assert gpu.counts_of(ended.output) == {"passed": 6}


@dataclass(frozen=True)
class Item:
    """A test without markers, of a conv and a dtype."""

    conv: int
    dtype: str
    nodeid: str = "test_gpu.py::test"

    @property
    def callspec(self):
        return SimpleNamespace(params={"conv": self.conv, "dtype": self.dtype})

    def get_closest_marker(self, name):
        return None


class Config:
    """What conftest asks of pytest's configuration."""

    def __init__(self, part):
        self.part = part
        self.deselected = []
        self.hook = SimpleNamespace(pytest_deselected=self.deselect)

    def getoption(self, name):
        return {"--every-configuration": True, "--part": self.part}[name]

    def deselect(self, items):
        self.deselected += items


def test_parts_are_all_tests_each_once():
    conftest = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
    items = [Item(conv, dtype) for conv in range(5) for dtype in "abcdefg"]
    chosen = []
    for part, dtypes in (("1/3", "adg"), ("2/3", "be"), ("3/3", "cf")):
        config, some = Config(part), list(items)
        conftest["pytest_collection_modifyitems"](config, some)
        # A dtype's kernels are compiled by one process, for all convolutions.
        assert {item.dtype for item in some} == {*dtypes}
        assert {*some, *config.deselected} == {*items}
        chosen += some
    assert len(chosen) == len(items) == len({*chosen})


def test_candidates_beside_what_is_chosen(monkeypatch):
    keys = gpu.keys_by_size("resnet18", 32, 2)
    assert {key.op for key in keys} >= {"conv_stats", "bn_conv_stats_backward"}
    sizes = [key.rows * key.c_out for key in keys]
    assert sizes == sorted(sizes, reverse=True)
    key = next(key for key in keys if key.op == "bn_conv_stats_backward")
    times = {"triton:small+small": 1.0, "cudnn": 2.0}
    runs = {name: (lambda name=name: name) for name in times}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu.choice, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(gpu.choice, "explain", lambda *args: ("cudnn", "a test"))
    monkeypatch.setattr(gpu.tune, "contestants", lambda key, dtype, device, names: runs)
    record = gpu.candidate_record(key, lambda run: times[run()])
    assert list(record["seconds"].items()) == [("triton:small+small", 1.0), ("cudnn", 2.0)]
    assert (record["chosen"], record["fastest"], record["gain"]) == (
        "cudnn",
        "triton:small+small",
        2.0,
    )
    del runs["cudnn"]
    assert gpu.candidate_record(key, lambda run: times[run()])["gain"] is None


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
        record("gpu-candidates", "a key", chosen="cudnn", fastest="triton:tall", gain=1.25),
        record("gpu-candidates", "another", chosen="cudnn", fastest="cudnn", gain=1.0),
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
        "cudnn: 1.25 x triton:tall",
    ):
        assert part in text
    assert "another" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_without_a_gpu(capsys):
    assert gpu.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.parse(["--minutes", "0"])

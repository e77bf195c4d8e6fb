"""Several processes that train one model, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastres.data.shares import share_of
from fastres.train import checkpoint
from fastres.train import run as run_state
from running import MINUTES, in_two

# 50 images for training in batches of 15: neither these nor the last 5 can be halved.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from fastres import cli, data
from fastres.train import loop
from fastres.train import run as run_state

sys.path.insert(0, TESTS)
from tiny_resnets import by_fastres, plain_resnet

torch.set_num_threads(1)
# In float64: a run in float32 doubles its rounding errors with every few steps.
def build(name, arguments):
    return by_fastres(plain_resnet(classes=arguments["num_classes"])).double()

read = data.Batches.iterate
run_state.build_model = build
data.Batches.iterate = lambda self, first=0: ((x.double(), y) for x, y in read(self, first))
whole = data.sample()
few = data.Dataset(whole.train[torch.arange(63)], whole.test[torch.arange(20)])
loop.load = lambda name, root: few
EXTRA
def gloo_threads():
    names = [Path(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task")]
    return [name.read_text() for name in names if "gloo" in name.read_text()]

finish = run_state.Run.save_last
def save_last(run, path):
    # Where two processes have none, their names have changed, and the check below sees none either.
    assert gloo_threads() or "RANK" not in os.environ
    finish(run, path)

run_state.Run.save_last = save_last
code = cli.main(sys.argv[1:])
# They let go of tensors' Python objects: one that does so while Python ends is what aborts it.
sys.exit(f"still there: {gloo_threads()}" if gloo_threads() else code)
"""
AT_STEP = """
iterate = data.Batches.iterate

def disturbed(self, first=0):
    for step, (images, labels) in enumerate(iterate(self, first), start=first + 1):
        if self.augment and (self.epoch, step, os.environ["RANK"]) == (1, 2, "1"):
            DISTURB
        yield images, labels

data.Batches.iterate = disturbed
"""
WORDS = """
    train --recipe best --epochs 2 --batch-size 15 --lr 0.005 --valid-ratio 0.2 --sync-bn
    --device cpu --out
"""
SETTINGS = WORDS.split()
TESTS = Path(__file__).parent


def script(folder: Path, extra: str = "") -> Path:
    path = folder / "script.py"
    path.write_text(SCRIPT.replace("EXTRA", extra).replace("TESTS", repr(str(TESTS))))
    return path


def history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run of two processes, and what torchrun let them say."""
    folder = tmp_path_factory.mktemp("together")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, str(script(folder)), *SETTINGS, str(folder / "run")],
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


@pytest.mark.parametrize(("start", "stop"), [(0, 15), (45, 50), (3, 4), (7, 7)])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_the_batch(start: int, stop: int, size: int) -> None:
    taken = [share_of(start, stop, (rank, size)) for rank in range(size)]
    positions = [i for share in taken for i in range(share.start, share.stop)]
    assert positions == list(range(start, stop))
    lengths = [share.stop - share.start for share in taken]
    assert max(lengths) - min(lengths) <= 1


def test_two_processes_give_the_curve_of_one(together: tuple[Path, str], tmp_path: Path) -> None:
    out, said = together
    alone = subprocess.run(
        [sys.executable, str(script(tmp_path)), *SETTINGS, str(tmp_path / "alone")],
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    assert alone.returncode == 0, alone.stderr
    for one, two in zip(history(tmp_path / "alone"), history(out), strict=True):
        for key in ("train_loss", "valid_loss"):
            assert two[key] == pytest.approx(one[key], rel=1e-6), key
        assert two["lr"] == one["lr"]
        # 50 and 13 images are counted once each; an accuracy may differ by one of them.
        assert two["train_accuracy"] == pytest.approx(one["train_accuracy"], abs=1.01 / 50)
        assert two["valid_accuracy"] == pytest.approx(one["valid_accuracy"], abs=1.01 / 13)
    assert said.count("epoch   1/2") == 1
    assert "2 x cpu" in said


def test_signal_to_one_stops_both_and_they_go_on(
    together: tuple[Path, str], tmp_path: Path
) -> None:
    extra = AT_STEP.replace("DISTURB", "os.kill(os.getpid(), signal.SIGTERM)")
    out = tmp_path / "run"
    first, second = in_two(script(tmp_path, extra), *SETTINGS, str(out))
    assert (first[0], second[0]) == (130, 130), (first[2], second[2])
    assert f"stopped; go on with: fastres train --out {out} --resume" in first[2]
    assert "stopped" not in second[2]
    saved = checkpoint.load(out / "last.pt", run_state.RUN_KEYS)
    assert (saved["epoch"], saved["meter"]["step"], saved["meter"]["images"]) == (1, 2, 30)
    done = in_two(script(tmp_path), "train", "--resume", "--out", str(out))
    assert [code for code, _, _ in done] == [0, 0], done
    a, b = (checkpoint.load(run / "last.pt", run_state.RUN_KEYS) for run in (out, together[0]))
    for key, value in a["model"].items():
        torch.testing.assert_close(value, b["model"][key])
    for one, two in zip(history(out), history(together[0]), strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-6)
        assert one["train_accuracy"] == two["train_accuracy"]


def test_error_in_one_ends_both(tmp_path: Path) -> None:
    extra = AT_STEP.replace("DISTURB", 'images = images * float("nan")')
    out = tmp_path / "run"
    plain = [word for word in SETTINGS if word != "--sync-bn"]  # with it, both see the NaN
    first, second = in_two(script(tmp_path, extra), *plain, str(out))
    assert (first[0], second[0]) == (2, 2), (first[2], second[2])
    assert "epoch 2: the loss is nan at step 2" in second[2]
    assert "Traceback" not in first[2]
    assert checkpoint.load(out / "last.pt", run_state.RUN_KEYS)["epoch"] == 1

"""Runs that are killed, stopped or let down by the disk, and go on to the same end."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fastres import data, train
from fastres.train import checkpoint, loop
from fastres.train import run as run_state
from fastres.train.files import write_atomically
from running import run_python
from tiny_runs import FEW_EPOCHS, TINY, assert_same_end, fit, last, use_tiny


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny(monkeypatch)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """The folder of a run of three epochs that nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken") / "run"

    def folder() -> Path:  # called in a test, where the tiny model is in place
        if not out.exists():
            fit(out)
        return out

    return folder


# Where a process shoots itself: after a training step, or before a file is put in place.
KILL_POINTS = (
    "(run.epoch, run.meter.step) == (0, 2)",
    "(run.epoch, run.meter.step) == (1, 5)",
    "target == 'best.pt' and run.epoch == 1",
    "target == 'last.previous.pt' and run.epoch == 2",
    "target == 'last.pt' and run.epoch == 2",
    "target == 'metrics.jsonl' and run.epoch == 2",
    "target == 'curves.png' and run.epoch == 3",
    "target == 'result.json'",
)
KILLED = """
import os, signal, sys
import matplotlib.figure, matplotlib.ticker  # once, and not in every child
from pathlib import Path
from fastres import train
from fastres.train import loop, report
from fastres.train import run as run_state

run_state.build_model, loop.load = build_model, load
runs = []
init, step, replace = run_state.Run.__init__, report.Report.training_step, os.replace
point = None

def shoot(run, target):
    if eval(point):
        os.kill(os.getpid(), signal.SIGKILL)

def replacing(source, target):
    if runs:
        shoot(runs[0], Path(target).name)
    replace(source, target)

run_state.Run.__init__ = lambda run, *args: (runs.append(run), init(run, *args))[1]
report.Report.training_step = lambda self, meter: (step(self, meter), shoot(runs[0], None))[0]
os.replace = replacing

for number, point in enumerate(POINTS):
    if (child := os.fork()) == 0:
        train.fit(train.TrainConfig(out=OUT / str(number), **FEW_EPOCHS), progress=False)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, point
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run per kill point, each killed there; one process is their parent."""
    out = tmp_path_factory.mktemp("killed")
    script = out / "killed.py"
    names = f"POINTS, FEW_EPOCHS = {KILL_POINTS!r}, {FEW_EPOCHS!r}\n"
    script.write_text(TINY + names + KILLED.replace("OUT", f"Path({str(out)!r})"))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


# Runs that are killed again and again, after times drawn from all that a whole run takes.
AT_ANY_TIME = """
import os, random, shutil, signal, time
import matplotlib.figure, matplotlib.ticker  # once, and not in every child
from pathlib import Path
from fastres import train
from fastres.train import loop
from fastres.train import run as run_state

run_state.build_model, loop.load = build_model, load

def fit(out, **settings):
    config = train.recipe("best", out=out, **{**FEW_EPOCHS, "valid_ratio": 0.2, **settings})
    train.fit(config, progress=False)

def in_a_child(out, seconds=None):
    if (child := os.fork()) == 0:
        fit(out, resume=(out / "config.json").exists())
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

draw = random.Random(SEED)
start = time.perf_counter()
assert in_a_child(OUT / "unbroken") == 0
duration = time.perf_counter() - start
for run in range(RUNS):
    out, kills = OUT / f"broken-{run}", 0
    while kills == 0:  # a machine that has become faster ends a run before it can be killed
        if out.exists():
            shutil.rmtree(out)
            duration /= 2
        for _ in range(KILLS):
            if in_a_child(out, draw.uniform(0, duration)) == 0:
                break
            kills += 1
        else:
            assert in_a_child(out) == 0
"""
RUNS, KILLS = 2, 8


class TestResume:
    @pytest.mark.parametrize("number", range(len(KILL_POINTS)), ids=KILL_POINTS)
    def test_killed_and_resumed_is_bit_equal(
        self, number: int, killed: Path, unbroken: Callable[[], Path]
    ) -> None:
        out = killed / str(number)
        assert not (out / "result.json").exists()
        fit(out, resume=True)
        assert_same_end(out, unbroken())

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize(("epoch", "step"), [(0, 1), (1, 5), (2, 3)])
    def test_signal_saves_inside_the_epoch(
        self,
        number: signal.Signals,
        epoch: int,
        step: int,
        tmp_path: Path,
        unbroken: Callable[[], Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        out = tmp_path / "run"
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        real = data.Batches.iterate

        def iterate(self: data.Batches, first: int = 0) -> Any:
            for index, batch in enumerate(real(self, first), start=1):
                if self.augment and (self.epoch, index) == (epoch, step):
                    os.kill(os.getpid(), number)
                yield batch

        with monkeypatch.context() as patch:
            patch.setattr(data.Batches, "iterate", iterate)
            with pytest.raises(train.RunInterruptedError, match=f"train --out {out} --resume"):
                fit(out)
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
        saved = last(out)
        assert (saved["epoch"], saved["meter"]["step"]) == (epoch, step)
        fit(out, resume=True)
        assert_same_end(out, unbroken())

    @pytest.mark.parametrize("part", [20, 40])
    def test_signal_while_evaluating(
        self,
        part: int,
        tmp_path: Path,
        unbroken: Callable[[], Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        real = data.Batches.iterate

        def iterate(self: data.Batches, first: int = 0) -> Any:
            if len(self.part) == part:
                os.kill(os.getpid(), signal.SIGINT)
            yield from real(self, first)

        with monkeypatch.context() as patch:
            patch.setattr(data.Batches, "iterate", iterate)
            with pytest.raises(train.RunInterruptedError):
                fit(tmp_path)
        fit(tmp_path, resume=True)
        assert_same_end(tmp_path, unbroken())

    def test_more_epochs(self, tmp_path: Path, unbroken: Callable[[], Path]) -> None:
        fit(tmp_path, epochs=1)
        fit(tmp_path, resume=True, epochs=3)
        assert_same_end(tmp_path, unbroken())

    def test_finished_run_ends_the_same(self, tmp_path: Path, unbroken: Callable[[], Path]) -> None:
        fit(tmp_path)
        fit(tmp_path, resume=True)
        assert_same_end(tmp_path, unbroken())

    def test_early_stopping_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = loop.evaluate

        def evaluate(model: nn.Module, batches: data.Batches, **options: Any) -> train.Meter:
            meter = real(model, batches, **options)
            meter.correct = 5
            return meter

        monkeypatch.setattr(loop, "evaluate", evaluate)
        fit(tmp_path, epochs=2, patience=3)
        result = fit(tmp_path, epochs=9, patience=3, resume=True)
        assert (result.best_epoch, result.epochs) == (1, 4)

    def test_other_settings_are_refused_by_name(self, tmp_path: Path) -> None:
        fit(tmp_path, epochs=1)
        before = (tmp_path / "last.pt").read_bytes()
        with pytest.raises(train.RunFolderError) as error:
            fit(tmp_path, epochs=1, resume=True, lr=0.7, seed=3, root=Path("elsewhere"))
        assert "lr (was 0.02, is 0.7)" in str(error.value)
        assert "seed (was 0, is 3)" in str(error.value)
        assert "root (" not in str(error.value)
        assert "momentum" not in str(error.value)
        assert (tmp_path / "last.pt").read_bytes() == before

    def test_no_run_there(self, tmp_path: Path) -> None:
        with pytest.raises(train.RunFolderError, match=f"no run to resume in {tmp_path}"):
            fit(tmp_path, resume=True)

    def test_best_of_another_run(self, tmp_path: Path) -> None:
        fit(tmp_path)
        content = checkpoint.load(tmp_path / "best.pt", run_state.MODEL_KEYS)
        checkpoint.save(tmp_path / "best.pt", {**content, "epoch": 99})
        (tmp_path / "best.previous.pt").unlink()
        with pytest.raises(train.CheckpointError, match=r"best\.pt is of epoch 99"):
            fit(tmp_path, resume=True)

    def test_killed_at_any_time_again_and_again(self, tmp_path: Path) -> None:
        """With every part of `best`; whenever it is killed, it goes on to the same end."""
        names = f"FEW_EPOCHS, SEED, RUNS, KILLS = {FEW_EPOCHS!r}, 1, {RUNS}, {KILLS}\n"
        script = TINY + names + AT_ANY_TIME.replace("OUT", f"Path({str(tmp_path)!r})")
        done = run_python(script)
        assert done.returncode == 0, done.stderr
        for run in range(RUNS):
            assert_same_end(tmp_path / f"broken-{run}", tmp_path / "unbroken")
            leftovers = [path.name for path in (tmp_path / f"broken-{run}").glob(".*")]
            assert leftovers == []


def spoil(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def test_killed_while_it_began(tmp_path: Path) -> None:
    """Half a config.json in the folder and nothing else is no run, and no reason to refuse one."""
    (tmp_path / ".config.json.tmp").write_text("{")
    fit(tmp_path, epochs=1)
    assert not (tmp_path / ".config.json.tmp").exists()


class TestDamage:
    """The checkpoint before stands in for one that is damaged or gone."""

    @pytest.mark.parametrize("gone", [False, True])
    def test_previous_is_used_and_said(
        self,
        gone: bool,
        tmp_path: Path,
        unbroken: Callable[[], Path],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        fit(tmp_path, epochs=2)
        if gone:
            (tmp_path / "last.pt").unlink()
        else:
            spoil(tmp_path / "last.pt")
        settings = train.TrainConfig(out=tmp_path, **{**FEW_EPOCHS, "resume": True})
        train.fit(settings)
        said = capsys.readouterr().out
        assert f"going on from {tmp_path / 'last.previous.pt'}" in said
        assert ("no checkpoint at" if gone else "is damaged") in said
        assert_same_end(tmp_path, unbroken())

    def test_previous_is_not_lost_to_the_damaged_one(self, tmp_path: Path) -> None:
        """Stopped in the next step: there are two whole checkpoints again."""
        fit(tmp_path, epochs=2)
        spoil(tmp_path / "last.pt")
        fit(tmp_path, epochs=2, resume=True)
        for name in ("last.pt", "last.previous.pt"):
            checkpoint.load(tmp_path / name, run_state.RUN_KEYS)

    def test_both_damaged(self, tmp_path: Path) -> None:
        fit(tmp_path, epochs=2)
        for name in ("last.pt", "last.previous.pt"):
            spoil(tmp_path / name)
        with pytest.raises(train.CheckpointError, match=r"last\.pt is .*; and .*previous\.pt is "):
            fit(tmp_path, resume=True)

    def test_best_of_before(
        self, tmp_path: Path, unbroken: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Back before an epoch that was the best, the best is the one before."""
        real = loop.evaluate

        def better_every_epoch(model: nn.Module, batches: Any, **options: Any) -> train.Meter:
            meter = real(model, batches, **options)
            if len(batches.part) == 20:
                meter.correct = counts.pop(0)
            return meter

        monkeypatch.setattr(loop, "evaluate", better_every_epoch)
        counts = [5, 9]
        fit(tmp_path, epochs=2)
        spoil(tmp_path / "last.pt")
        counts = [4, 3]  # on a GPU an epoch need not come out the same
        result = fit(tmp_path, epochs=3, resume=True)
        assert (result.best_epoch, result.valid_accuracy) == (1, 5 / 20)
        assert checkpoint.load(tmp_path / "best.pt", run_state.MODEL_KEYS)["epoch"] == 1

    def test_damaged_best_is_refused_before_any_work(self, tmp_path: Path) -> None:
        fit(tmp_path, epochs=2)
        spoil(tmp_path / "best.pt")
        (tmp_path / "best.previous.pt").unlink(missing_ok=True)
        before = (tmp_path / "last.pt").read_bytes()
        with pytest.raises(train.CheckpointError, match=r"best\.pt is damaged"):
            fit(tmp_path, resume=True)
        assert (tmp_path / "last.pt").read_bytes() == before


@contextmanager
def disk_that_takes(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestFullDisk:
    def test_error_names_the_file_and_the_last_good_one_stays(
        self, tmp_path: Path, unbroken: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "run"
        fit(out, epochs=1)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        real = checkpoint.save

        def save(path: Path, content: dict[str, Any]) -> None:
            with disk_that_takes(3000):
                real(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", save)
            with pytest.raises(train.WriteError, match=r"cannot write .*\.pt \(File too large\)"):
                fit(out, resume=True)
        after = {path.name: path.read_bytes() for path in out.iterdir()}
        assert after.keys() == before.keys()
        for name in ("best.pt", "last.pt"):
            assert after[name] == before[name]
        fit(out, resume=True)
        assert_same_end(out, unbroken())

    def test_other_errors_are_left_alone(self, tmp_path: Path) -> None:
        def fail(file: Any) -> None:
            raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine") as error:
            write_atomically(tmp_path / "a", fail)
        assert type(error.value) is RuntimeError
        assert list(tmp_path.iterdir()) == []

"""How the benches time, verify and write down what they measured."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# tests/cases.py, conditioning.py and tolerances.py are shared with the tests.
sys.path.insert(0, str(ROOT / "tests"))

PACKAGES = (
    "torch", "torchvision", "triton", "onnxruntime", "openvino", "ncnn", "MNN", "numpy", "fastres",
    "timm", "transformers",
)  # fmt: skip
EAGER = "torch eager"
# What commands write: a change there leaves the sources as they were.
RESULTS = (":!bench/results", ":!docs/compat.*")


class NotInstalledError(Exception):
    """A rival's package is not on this machine."""


@dataclass
class Runner:
    """One contestant, built.

    Attributes:
        run: does the timed work once.
        answer: computes what is verified, by name (once, before timing).
        tensors: what exists before the run anyhow: parameters, buffers, the batch.
    """

    run: Callable[[], Any]
    answer: Callable[[], dict[str, Tensor]]
    tensors: Callable[[], list[Tensor]] = list


@dataclass
class Race:
    """One case of a suite: contestants that must give the same answer.

    Attributes:
        suite, case: names.
        entrants: contestant's name -> function that builds it. Those whose name starts with
            "fastres" are ours.
        reference: the exact answer, by name, in float64 where memory allows.
        floor: a contestant's relative error may be `FACTOR` times torch eager's, plus this.
        sane: torch eager's own error, the yardstick, may be this.
        yardstick: which entrant stands for torch as it comes.
        flops, bytes, images: the work of one run, for rates. FLOPs are those of the direct
            convolution, a multiply-add being two; bytes are the fewest that must be moved.
        device: "cpu" or "cuda".
        peak: the entry of peaks.measure() that the rate is compared with.
    """

    suite: str
    case: str
    entrants: Mapping[str, Callable[[], Runner]]
    reference: Callable[[], dict[str, Tensor]]
    floor: float
    sane: float = 0.01
    flops: float | None = None
    bytes: float | None = None
    images: int | None = None
    device: str = "cpu"
    peak: str = ""
    yardstick: str = EAGER
    extra: dict[str, Any] = field(default_factory=dict)


# A contestant's error against the exact answer may be this many times torch eager's (Winograd's
# own error is up to four times a direct convolution's), plus the race's floor.
FACTOR = 4.0


def relative_error(actual: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """The largest over the names of |actual - exact| / |exact|; infinite where not finite."""
    worst = 0.0
    for name, expected in exact.items():
        wanted = expected.detach().double()
        got = actual[name].detach().to(wanted.device).double()
        if got.shape != wanted.shape:
            raise ValueError(f"{name} has shape {tuple(got.shape)}, not {tuple(wanted.shape)}")
        error = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
        worst = max(worst, error if error == error else float("inf"))
    return worst


class WrongAnswerError(Exception):
    """A contestant's answer is further from the exact one than it may be."""


class Judge:
    """Compares answers with the exact one of a race, by the yardstick's own error."""

    def __init__(self, race: Race) -> None:
        self.race = race
        self.exact = race.reference()
        self.errors: dict[str, float] = {}

    def admit(self, name: str) -> Runner:
        """Build the entrant `name`, verify its answer and note its error.

        Raises:
            NotInstalledError: its package is missing.
            WrongAnswerError: its answer is wrong.
        """
        runner = self.race.entrants[name]()
        error = relative_error(runner.answer(), self.exact)
        self.errors[name] = error
        if name == self.race.yardstick:
            limit = self.race.sane
        else:
            limit = FACTOR * self.errors.get(self.race.yardstick, 0.0) + self.race.floor
        if not error <= limit:
            raise WrongAnswerError(f"relative error {error:.2g}, limit {limit:.2g}")
        return runner


def seconds_of(run: Callable[[], Any], repetitions: int, device: str) -> float:
    """Seconds per call of `repetitions` calls; on CUDA between two events on the stream."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repetitions):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repetitions
    before = time.perf_counter()
    for _ in range(repetitions):
        run()
    return (time.perf_counter() - before) / repetitions


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    least_seconds: float = 0.05,
    device: str = "cpu",
    on_timing: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Time every run in every round, so that a slow spell of the machine hits them all.

    The order rotates by one each round. A timing repeats its run until it lasts `least_seconds`;
    short runs are called once untimed first, which wakes their thread pool and fills the caches.
    """
    repetitions = {}
    for name, run in runs.items():
        seconds_of(run, 1, device)
        once = seconds_of(run, 1, device)
        repetitions[name] = max(1, int(least_seconds / max(once, 1e-7) + 0.999))
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        shift = turn % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            if repetitions[name] > 1:
                seconds_of(runs[name], 1, device)
            times[name].append(seconds_of(runs[name], repetitions[name], device))
            on_timing(name)
    return times


def median(values: list[float]) -> float:
    """The middle value; of an even number, the mean of the two in the middle."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def device_name(device: str) -> str:
    """The processor's model name, without the machine's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else model} ({torch.backends.cpu.get_cpu_capability()})"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part; a missing one is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str | None:
    """The checkout's commit, "-dirty" where sources differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *RESULTS)
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def circumstances(device: str) -> dict[str, Any]:
    """What a number must stand beside: device, threads, versions, commit, date."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": os.environ.get("FASTRES_CPU_CAPABILITY"),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def reason(error: BaseException) -> str:
    """An error in one short line without paths of this machine."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}".replace(str(Path.home()), "~")
    text = text.replace(str(ROOT), ".").replace(sys.prefix, "<prefix>")
    return text[:200]


def write_json(records: list[dict[str, Any]], path: Path) -> None:
    """Write all records at once, so that an interrupted run leaves a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(path.suffix + ".part")
    unfinished.write_text(json.dumps(records, indent=1) + "\n")
    unfinished.replace(path)

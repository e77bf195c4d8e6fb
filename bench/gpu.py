"""Everything that only a GPU can say, in one command of ten minutes.

    python bench/gpu.py                          then commit bench/results/gpu.json
    python bench/gpu.py --minutes 20 --rivals compile

Runs the tests marked gpu, then compare.py's gpu-train, gpu-infer, memory and ops, then fastres's
models kernel by kernel beside what each needs at the ceilings measured in this run (roofline.py),
and in what time is left every candidate of ResNet-50's convolutions, forward and backward, beside
the one that the tables choose (`fastres tune` measures them all and keeps the fastest). A step
that is out of time is interrupted and keeps the cases that are complete; what it does not use, the
next ones have. The table at the end is short: figures beside their targets, the kernels with the
most to gain, and where another candidate is faster than the chosen one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peaks
import rivals
import roofline
import torch
import workloads
from harness import ROOT, circumstances, median, seconds_of, write_json
from rich.console import Console
from rich.table import Table
from roofline import Ceilings, Work
from table import in_units
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import ModelCase, cifar

from fastres import tune
from fastres.kernels import choice
from fastres.kernels.choice import ConvKey

AMP = torch.bfloat16
# Of the whole time, what each step may take before those after it get less.
SHARES = {"tests": 0.2, "gpu-train": 0.26, "gpu-infer": 0.2, "memory": 0.07, "ops": 0.1}
# The case and whether it is a training step; the whole models that are looked at by kernel.
DISTANCE_CASES = (
    (ModelCase("resnet50", 224, 256), True),
    (cifar("resnet18", 512), True),
    (ModelCase("resnet50", 224, 256), False),
)
# Suite, pattern of the case's name, and the least of a record's figure: the ratio of the best
# rival's time (memory: torch eager's bytes) to fastres's; of element-wise ops the share of the
# copy's bandwidth.
TARGETS = (
    ("gpu-train", r"^resnet50-224px-n256$", "ratio", 1.25),
    ("gpu-train", r"^cifar-resnet18-32px-n512$", "ratio", 1.3),
    ("gpu-infer", r"^resnet(18|50)-224px-n(1|32|256)$", "ratio", 1.1),
    ("memory", r"resnet", "ratio_eager", 1 / 0.6),
    ("ops", r"^(bn_)?(add_)?relu (backward )?n\d", "share_of_peak", 0.9),
)


@dataclass(frozen=True)
class Ended:
    """How a step ended."""

    code: int
    interrupted: bool
    seconds: float
    output: str


def run_step(command: Sequence[str], limit: float, grace: float = 20.0) -> Ended:
    """Run a command from the repository's root; after `limit` seconds interrupt it, as Ctrl-C does.

    After `grace` seconds more it is ended.
    """
    started = time.monotonic()
    heeding = ["env", "--default-signal=INT", *command]  # a shell's background jobs ignore it
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(heeding, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        interrupted = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            interrupted = True
            process.send_signal(signal.SIGINT)
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        output.seek(0)
        text = output.read()
    return Ended(process.returncode, interrupted, time.monotonic() - started, text)


def counts_of(output: str) -> dict[str, int]:
    """How many tests passed, failed and so on, from the last lines of pytest's outputs."""
    found: Counter[str] = Counter()
    for line in output.splitlines():
        if re.search(r"\d+ (passed|failed|errors?|skipped).* in [\d.]+s", line):
            for count, name in re.findall(r"(\d+) (passed|failed|errors?|skipped)", line):
                found["error" if name == "errors" else name] += int(count)
    return dict(found)


def run_tests(limit: float) -> Ended:
    """The tests marked gpu, in processes side by side: most of their time compiles kernels.

    Returns:
        The sum: the first code that is not 0, the longest time, and the outputs one after another.
    """
    count = max(1, min(8, (os.cpu_count() or 1) // 2))
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    commands = [[*pytest, f"--part={part}/{count}"] for part in range(1, count + 1)]
    with ThreadPoolExecutor(count) as pool:
        ended = list(pool.map(lambda command: run_step(command, limit), commands))
    return Ended(
        next((one.code for one in ended if one.code), 0),
        any(one.interrupted for one in ended),
        max(one.seconds for one in ended),
        "\n".join(one.output for one in ended),
    )


# Distances


class _Timed(TorchDispatchMode):
    """Puts a stopwatch around every call that has work in the roofline."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.cuda = device == "cuda"
        self.calls: list[tuple[tuple[Work, ...], Any, Any]] = []

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = self._now()
        outputs = func(*args, **(kwargs or {}))
        end = self._now()
        works = tuple(roofline.works_of(func, args, kwargs or {}, outputs))
        if works:
            self.calls.append((works, start, end))
        return outputs

    def seconds(self) -> dict[tuple[Work, ...], list[float]]:
        """Of every kind of call the seconds of each."""
        if self.cuda:
            torch.cuda.synchronize()
        found: dict[tuple[Work, ...], list[float]] = {}
        for works, start, end in self.calls:
            taken = start.elapsed_time(end) / 1e3 if self.cuda else end - start
            found.setdefault(works, []).append(taken)
        return found


def distances(
    run: Callable[[], Any], ceilings: Ceilings, device: str, passes: int = 5
) -> list[dict[str, Any]]:
    """Each op and shape of `run`, which has run before: seconds, and those at the ceilings.

    Returns:
        "op", "kernels", "shape", "calls", "seconds" (the median of the passes, all calls together),
        "roofline", "distance" (the one over the other) and "excess" (their difference), the
        largest excess first. An op of several kernels is timed as one.
    """
    totals: dict[tuple[Work, ...], list[float]] = {}
    calls: dict[tuple[Work, ...], int] = {}
    for _ in range(passes):
        with _Timed(device) as timed:
            run()
        for works, seconds in timed.seconds().items():
            totals.setdefault(works, []).append(sum(seconds))
            calls[works] = len(seconds)
    lines = []
    for works, sums in totals.items():
        least = calls[works] * sum(ceilings.seconds(work) for work in works)
        seconds = median(sums)
        lines.append(
            {
                "op": works[0].op,
                "kernels": [work.kernel for work in works],
                "shape": works[0].shape,
                "calls": calls[works],
                "seconds": seconds,
                "roofline": least,
                "distance": seconds / least,
                "excess": seconds - least,
            }
        )
    return sorted(lines, key=lambda line: -line["excess"])


def distance_record(
    case: ModelCase, training: bool, ceilings: Ceilings, device: str, passes: int = 5
) -> dict[str, Any]:
    """A model's step as it is and at the ceilings, whole and kernel by kernel."""
    theirs = workloads.torchvision_model(case).to(device)
    model = workloads.fastres_model(case, theirs).train(training)
    images, labels = workloads.batch(case, device)
    if training:
        runner = rivals.training_step(model, images, labels, AMP)
    else:
        runner = rivals.eager(model, [images], AMP)
    for _ in range(3):
        runner.run()
    seconds = median([seconds_of(runner.run, 2, device) for _ in range(passes)])
    least = sum(ceilings.seconds(w) for w in roofline.work_of_model(case, training, AMP))
    return {
        "suite": "gpu-distance",
        "case": f"{case} {'training' if training else 'inference'}",
        "seconds": seconds,
        "roofline": least,
        "distance": seconds / least,
        "images_per_second": case.n / seconds,
        "ceilings": {"flops": ceilings.flops, "bandwidth": ceilings.bandwidth},
        "kernels": distances(runner.run, ceilings, device, passes),
    }


# Candidates


def candidate_record(key: ConvKey, timer: Callable[[Callable[[], object]], float]) -> Any:
    """The seconds of everything that computes a convolution rightly, and what is chosen.

    Returns:
        "seconds" by candidate, the fastest first; "chosen" and "why" of the tables, "fastest", and
        "gain": the chosen one's time over the fastest one's (None where it was not right).
    """
    device = torch.device("cuda", torch.cuda.current_device())
    names = choice.candidates(key, AMP, choice.target_of(device))
    runs = tune.contestants(key, AMP, device, names)
    seconds = tune.fastest([key], lambda key: runs, timer)[key]
    chosen, why = choice.explain(key, AMP, device)
    fastest = next(iter(seconds))
    return {
        "suite": "gpu-candidates",
        "case": str(key),
        "seconds": seconds,
        "chosen": chosen,
        "why": why,
        "fastest": fastest,
        "gain": seconds[chosen] / seconds[fastest] if chosen in seconds else None,
    }


def keys_by_size(model: str = "resnet50", size: int = 224, n: int = 256) -> list[ConvKey]:
    """A model's training convolutions and their backwards, the largest tensors first."""
    keys = tune.conv_keys(model, size, n, True, AMP)
    return sorted(keys, key=lambda key: -key.rows * key.c_out)


# The end


def against_targets(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str, bool]]:
    """Suite, case, figure, target and whether it is met, of every record that has a target.

    A ratio that is missing (fastres failed, or there was no rival) is not met.
    """
    found = []
    for record in records:
        for suite, pattern, name, least in TARGETS:
            if record["suite"] != suite or not re.search(pattern, record["case"]):
                continue
            value = record.get(name)
            text = "none" if value is None else f"{value:.2f}"
            met = value is not None and value >= least
            found.append((suite, record["case"], text, f"{least:.2f}", met))
    return found


def show(records: Sequence[Mapping[str, Any]], missing: Sequence[str], console: Console) -> None:
    """The short table."""
    table = Table("", "case", title="On this GPU", title_justify="left")
    for heading in ("figure", "at least", ""):
        table.add_column(heading, justify="right")
    for record in records:
        if record["suite"] == "gpu-tests":
            counts = ", ".join(f"{n} {name}" for name, n in record["counts"].items())
            fine = record["code"] == 0
            table.add_row("tests", "marked gpu", counts, "", "met" if fine else "[red]failed[/red]")
    for *cells, met in against_targets(records):
        table.add_row(*cells, "met" if met else "[red]missed[/red]")
    for record in records:
        if record["suite"] == "gpu-distance":
            figure = f"{in_units(record['seconds'])}, {record['distance']:.2f} x the roofline"
            table.add_row("distance", record["case"], figure, "", "")
            for line in record["kernels"][:3]:
                over = f"{in_units(line['excess'])} over, {line['distance']:.1f} x"
                table.add_row("", f"  {line['op']}, {line['shape']}", over, "", "")
        if record["suite"] == "gpu-candidates" and record["chosen"] != record["fastest"]:
            gain = "wrong" if record["gain"] is None else f"{record['gain']:.2f} x"
            figure = f"{record['chosen']}: {gain} {record['fastest']}"
            table.add_row("candidates", record["case"], figure, "", "")
    console.print(table)
    for name in missing:
        console.print(f"out of time: {name} is not complete")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything (10)")
    parser.add_argument("--rivals", help="as for compare.py")
    parser.add_argument("--quick", action="store_true", help="tiny cases: does it still run?")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=ROOT / "bench" / "results" / "gpu.json",
        help="bench/results/gpu.json",
    )
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes}, expected a number above 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    if not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device: there is nothing to measure", file=sys.stderr)
        return 2
    end = time.monotonic() + options.minutes * 60
    around = circumstances("cuda")
    records: list[dict[str, Any]] = []
    missing: list[str] = []
    given, used = 0.0, 0.0
    for name, share in SHARES.items():
        given += share * options.minutes * 60
        limit = max(given - used, 1.0)
        console.print(f"{name}: at most {limit:.0f} s")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "records.json"
            if name == "tests":
                step = run_tests(limit)
            else:
                command = [sys.executable, "bench/compare.py", name, "--json", str(path)]
                command += ["--quick"] if options.quick else ["--rounds", "5"]
                command += ["--rivals", options.rivals] if options.rivals else []
                step = run_step(command, limit)
            used += step.seconds
            console.print(step.output, markup=False)
            if name == "tests":
                counts = {"code": step.code, "counts": counts_of(step.output)}
                records.append({"suite": "gpu-tests", "case": "tests", **counts, **around})
            elif path.exists():
                records += json.loads(path.read_text())
        if step.interrupted:
            missing.append(name)
        write_json(records, options.json)
    found = peaks.measure("cuda", options.quick)
    ceilings = Ceilings(found["bfloat16 FLOP/s"], found["copy B/s"], "measured in this run")
    cases = ((workloads.QUICK, True),) if options.quick else DISTANCE_CASES
    for case, training in cases:
        if time.monotonic() > end:
            missing.append(f"distance of {case}")
            continue
        records.append({**distance_record(case, training, ceilings, "cuda"), **around})
        write_json(records, options.json)
        torch.cuda.empty_cache()
    keys = keys_by_size("resnet18", 32, 2) if options.quick else keys_by_size()
    timed = 0
    for key in keys:
        if time.monotonic() > end:
            break
        records.append({**candidate_record(key, tune.median_seconds), **around})
        timed += 1
        write_json(records, options.json)
        torch.cuda.empty_cache()
    show(records, missing, console)
    console.print(f"candidates of {timed} of {len(keys)} convolutions; `fastres tune` times all")
    console.print(f"wrote {len(records)} records to {options.json}")
    tests = next(record for record in records if record["suite"] == "gpu-tests")
    wrong = [record for record in records if record.get("fastres", "") is None]
    return 1 if tests["code"] or wrong or missing else 0


if __name__ == "__main__":
    sys.exit(main())

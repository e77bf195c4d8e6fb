"""Race fastres against every rival that is installed, in one run.

    python bench/compare.py cpu-infer cpu-train --json bench/results/cpu.json

Every contestant's answer is verified before any is timed; timings are interleaved round by round
and reported as medians. A rival that is missing or fails is listed with the reason.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layers
import torch
from harness import (
    Judge,
    NotInstalledError,
    Race,
    Runner,
    circumstances,
    interleaved,
    median,
    reason,
    write_json,
)
from peaks import measure, put_shares
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from suites import SUITES, Options, measure_memory
from table import in_units

GPU_SUITES = ("gpu-infer", "gpu-train")
# The suites whose time is shown by kind of layer.
LAYER_SUITES = ("cpu-infer", "cpu-train")
Say = Callable[[str], None]


def build_and_verify(race: Race, say: Say) -> tuple[dict[str, Runner], dict[str, Any]]:
    """Build every entrant and compare its answer with the exact one.

    Returns:
        The runners that gave the right answer, and the record's "verified" (relative errors) and
        "failed" (reasons) entries.
    """
    judge = Judge(race)
    runners: dict[str, Runner] = {}
    failed: dict[str, str] = {}
    # The yardstick's error is what the others' are judged by, so it comes first.
    for name in sorted(race.entrants, key=lambda entrant: entrant != race.yardstick):
        say(f"{race.case}: {name}: building and verifying")
        try:
            runners[name] = judge.admit(name)
        except NotInstalledError:
            failed[name] = "not installed"
        except Exception as problem:  # A rival's own failure is a result, shown as such.
            failed[name] = reason(problem)
    return runners, {"verified": judge.errors, "failed": failed}


def best(times: dict[str, float], ours: bool) -> str | None:
    """The name with the least time among ours, or among the rivals."""
    names = [name for name in times if name.startswith("fastres") == ours]
    return min(names, key=times.__getitem__) if names else None


def race_times(race: Race, runners: dict[str, Runner], rounds: int, quick: bool, tick: Say):
    """The record's entries of a race against the clock."""
    runs = {name: runner.run for name, runner in runners.items()}
    rounds_of = interleaved(runs, rounds, 0.0 if quick else 0.05, race.device, tick)
    times = {name: median(values) for name, values in rounds_of.items()}
    found: dict[str, Any] = {
        "times": times,
        "min": {name: min(values) for name, values in rounds_of.items()},
        "rounds": rounds,
    }
    return found, times


def race_memory(race: Race, runners: dict[str, Runner], tick: Say):
    """The record's entries of a race for the fewest bytes."""
    measured = {}
    for name, runner in runners.items():
        runner.run()
        measured[name] = measure_memory(runner, race)
        tick(name)
    peak = {name: figures["peak"] for name, figures in measured.items()}
    kept = {name: figures["kept"] for name, figures in measured.items()}
    return {"times": {}, "peak_bytes": peak, "kept_bytes": kept}, peak


def run_race(
    race: Race, rounds: int, quick: bool, say: Say, tick: Say
) -> tuple[dict[str, Any], layers.Profile | None]:
    """Verify and measure one case.

    Returns:
        Its JSON record, and in the suites of models on the CPU the profile of fastres.
    """
    runners, outcome = build_and_verify(race, say)
    say(race.case)
    by_memory = race.extra.get("measure") == "memory"
    if by_memory:
        found, compared = race_memory(race, runners, tick)
    else:
        found, compared = race_times(race, runners, rounds, quick, tick)
    profile = None
    # The peaks that its table is held against are float32's.
    if race.suite in LAYER_SUITES and "float32" in race.peak and "fastres" in runners:
        say(f"{race.case}: fastres by kind of layer")
        profile = layers.profile(runners["fastres"].run, rounds)
    ours, rival = best(compared, True), best(compared, False)
    record: dict[str, Any] = {"suite": race.suite, "case": race.case, **found}
    record["fastres"], record["best_rival"], record["yardstick"] = ours, rival, race.yardstick
    record["ratio"] = compared[rival] / compared[ours] if ours and rival else None
    eager = race.yardstick
    record["ratio_eager"] = compared[eager] / compared[ours] if ours and eager in compared else None
    for name in ("flops", "bytes", "images"):
        if getattr(race, name) is not None:
            record[name] = getattr(race, name)
    if race.peak:
        record["peak"] = race.peak
    if by_memory and ours and eager in compared:
        kept = found["kept_bytes"]
        record["ratio_kept"] = kept[eager] / kept[ours]
    record = {**record, **race.extra, **outcome, "tolerance_floor": race.floor, "quick": quick}
    return record, profile


def show(records: list[dict[str, Any]], console: Console) -> None:
    """Print a table a suite, a line a contestant."""
    for suite in dict.fromkeys(record["suite"] for record in records):
        table = Table(title=suite, title_justify="left")
        for heading in ("case", "contestant", "median", "min", "rate", "images/s", "of fastres"):
            table.add_column(
                heading, justify="left" if heading in ("case", "contestant") else "right"
            )
        for record in records:
            if record["suite"] == suite:
                _add_rows(table, record)
        console.print(table)
        for record in records:
            if record["suite"] == suite and "layers" in record:
                console.print(_layers_table(record))


def _layers_table(record: dict[str, Any]) -> Table:
    verdict = layers.verdict(record["layers"], record["peaks"])
    title = f"{record['case']}: fastres by kind of layer"
    table = Table(title=title, title_justify="left", caption=verdict, caption_justify="left")
    for heading in layers.HEADINGS:
        table.add_column(heading, justify="left" if heading == layers.HEADINGS[0] else "right")
    for line in record["layers"]:
        table.add_row(*layers.cells(line))
    return table


def _add_rows(table: Table, record: dict[str, Any]) -> None:
    compared = record.get("peak_bytes") or record["times"]
    ours = compared.get(record["fastres"])
    by_memory = "peak_bytes" in record
    label = record["case"]
    for name in sorted(compared, key=compared.__getitem__):
        value = compared[name]
        relative = f"{value / ours:.2f} x" if ours else ""
        if by_memory:
            kept = f"{record['kept_bytes'][name] / 1e6:,.1f} MB kept"
            cells = [f"{value / 1e6:,.1f} MB peak", kept, "", ""]
        else:
            work, unit = record.get("flops"), "GFLOP/s"
            if work is None:
                work, unit = record.get("bytes"), "GB/s"
            rate = f"{work / value / 1e9:,.1f} {unit}" if work else ""
            images = f"{record['images'] / value:,.1f}" if "images" in record else ""
            cells = [in_units(value), in_units(record["min"][name]), rate, images]
        style = "bold" if name == record["fastres"] else None
        table.add_row(label, name, *cells, relative, style=style)
        label = ""
    for name, why in record["failed"].items():
        table.add_row(label, name, why, style="dim" if why == "not installed" else "red")
        label = ""
    ratio, eager = record["ratio"], record["ratio_eager"]
    summary = [f"best rival / fastres {ratio:.2f}" if ratio else "no ratio"]
    if eager:
        summary.append(f"{record['yardstick']} / fastres {eager:.2f}")
    if "ratio_kept" in record:
        summary.append(
            f"kept for the backward, {record['yardstick']} / fastres {record['ratio_kept']:.2f}"
        )
    if "share_of_peak" in record:
        summary.append(f"{record['share_of_peak']:.0%} of the measured {record['peak']}")
    table.add_row("", "[i]" + "; ".join(summary) + "[/i]", end_section=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.HelpFormatter
    )
    parser.add_argument("suite", nargs="+", choices=sorted(SUITES), metavar="SUITE",
                        help=", ".join(SUITES))  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--quick", action="store_true", help="tiny cases: does it still run?")
    parser.add_argument("--rounds", type=int, help="timings per contestant (default 9; quick 2)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--rivals",
        help="comma-separated parts of contestants' names; torch eager and fastres stay",
    )
    parser.add_argument("--threads", type=int, help="threads of torch and of every rival")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="of the suites memory and ops (default: CUDA where torch sees one)",
    )
    return parser.parse_args(arguments)


def keep_rivals(race: Race, asked: str | None) -> None:
    """Leave only the contestants that the command line asks for."""
    if asked is None:
        return
    parts = [part.strip().lower() for part in asked.split(",")]
    race.entrants = {
        name: build
        for name, build in race.entrants.items()
        if name in (race.yardstick, "fastres") or any(part in name.lower() for part in parts)
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    progress_console = Console(stderr=True)
    # A table in a file or a pipe is not squeezed into 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 130)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    rounds = options.rounds or (2 if options.quick else 9)
    records: list[dict[str, Any]] = []
    profiles: list[tuple[dict[str, Any], layers.Profile]] = []
    interrupted = False
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=progress_console) as progress:
        bar = progress.add_task("starting")
        try:
            for suite in dict.fromkeys(options.suite):
                device = "cuda" if suite in GPU_SUITES else options.device
                device = device if suite in (*GPU_SUITES, "memory", "ops") else "cpu"
                if device == "cuda" and not torch.cuda.is_available():
                    console.print(f"{suite}: skipped: torch sees no CUDA device")
                    continue
                around = circumstances(device)
                for name, build in SUITES[suite](Options(options.quick, device)):
                    if options.only not in name:
                        continue
                    progress.update(bar, description=f"{suite} {name}", completed=0, total=None)
                    measure(device, options.quick)
                    race = build()
                    keep_rivals(race, options.rivals)
                    progress.update(bar, total=rounds * len(race.entrants))
                    record, profile = run_race(
                        race,
                        rounds,
                        options.quick,
                        lambda text: progress.update(bar, description=text),
                        lambda _: progress.advance(bar),
                    )
                    records.append({**record, "runs_on": device, **around})
                    if profile is not None:
                        profiles.append((records[-1], profile))
                    put_shares(records)
                    for profiled, found in profiles:
                        profiled["layers"] = layers.by_kind(found, profiled["peaks"])
                    if options.json:
                        write_json(records, options.json)
                    del race
                    # Compiled code of one case is of no use to the next, and holds its weights.
                    torch._dynamo.reset()
                    gc.collect()
        except KeyboardInterrupt:
            interrupted = True
    show(records, console)
    if options.json and records:
        console.print(f"wrote {len(records)} records to {options.json}")
    if interrupted:
        console.print("interrupted: the cases above are complete")
        return 130
    # A wrong or missing fastres is not a result to pass over in silence.
    return 0 if all(record["fastres"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())

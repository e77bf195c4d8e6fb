"""Tables in Markdown from the JSON files that compare.py writes.

    python bench/table.py bench/results/cpu.json                  print every suite's table
    python bench/table.py --update README.md docs/benchmarks.md   fill the documents' marked places
    python bench/table.py --check README.md docs/benchmarks.md    fail where one is out of date

A marked place begins with `<!-- bench FILE SUITE -->`, FILE relative to the repository's root, and
ends with `<!-- /bench -->`. `roofline` in place of a suite gives where fastres's time goes by kind
of layer in every case that has it, `roofline:CASE` in that case.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import layers

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(
    r"(?P<open><!-- bench (?P<file>\S+) (?P<suite>\S+) -->\n)"
    r"(?P<body>.*?)(?P<close><!-- /bench -->)",
    re.DOTALL,
)

# The packages whose versions stand below a table.
SHOWN = (
    *("torch", "torchvision", "timm", "transformers"),
    *("onnxruntime", "openvino", "ncnn", "MNN"),
)


def in_units(seconds: float) -> str:
    """Seconds with three digits, in s, ms or µs."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _cell(record: dict[str, Any], name: str | None) -> str:
    if name is None:
        return "none"
    if "peak_bytes" in record:
        return f"{record['peak_bytes'][name] / 1e6:,.0f} MB"
    seconds = record["times"][name]
    if record["suite"].endswith("-train"):
        return f"{in_units(seconds)}, {record['images'] / seconds:.3g} images/s"
    return in_units(seconds)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _circumstances(record: dict[str, Any], measure: str) -> str:
    versions = record["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)
    commit = (record["commit"] or "unknown")[:8] + (
        "-dirty" if "dirty" in (record["commit"] or "") else ""
    )
    return (
        f"{record['device']}, {record['threads']} threads, {measure}; {packages}; "
        f"commit {commit}, {record['date'][:10]}."
    )


def _epoch(record: dict[str, Any]) -> list[str]:
    """Of epoch.py: the two forms of a model, and how far apart they went."""
    lines = [
        "| | images/s | mean training loss | validation loss | validation accuracy |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, form in record["forms"].items():
        lines.append(
            f"| {name} | {form['images_per_second']:.1f} "
            f"| {sum(form['losses']) / len(form['losses']):.4f} | {form['valid_loss']:.4f} "
            f"| {form['valid_accuracy']:.2%} |"
        )
    gap = record["agreement"]
    steps = len(next(iter(record["forms"].values()))["losses"])
    return [
        *lines,
        "",
        f"The mean losses of the {steps} steps differ by {abs(gap['gap_of_mean_losses']):.1e}, the "
        f"losses of a step by {gap['median_gap']:.1e} in the median.",
        _circumstances(record, record["case"]),
    ]


def _seeds(record: dict[str, Any]) -> list[str]:
    """Of seeds.py: how far the first losses part, and the accuracies in the end."""
    lines = ["| steps | fused | plain, other layout |", "|---|---:|---:|"]
    for line in record["largest_gaps"]:
        first, last = line["steps"]
        span = f"{first}" if first == last else f"{first} to {last}"
        lines.append(f"| {span} | {line['fused']:.1e} | {line['plain, other layout']:.1e} |")
    parted = [line for line in record["largest_gaps"] if line["plain, other layout"] > 0]
    ratio = max((line["fused"] / line["plain, other layout"] for line in parted), default=0.0)
    found = record["accuracy"]
    verdict = "not " if found["same"] else ""
    half = (found["interval_high"] - found["interval_low"]) / 2
    return [
        *lines,
        "",
        f"Fused is at most {ratio:.1f} times as far from plain as plain's other layout is.",
        f"Test accuracy of {len(record['runs'])} seeds, mean and standard deviation: plain "
        f"{found['plain_mean']:.1%} ± {found['plain_deviation']:.1%}, fused "
        f"{found['fused_mean']:.1%} ± {found['fused_deviation']:.1%}; the mean difference, "
        f"{100 * found['difference']:+.1f} points, is {verdict}significantly different "
        f"from zero: its {record['confidence']:.0%} interval (paired t) is "
        f"{100 * found['interval_low']:+.1f} to "
        f"{100 * found['interval_high']:+.1f}, so that less than {100 * half:.1f} points would not "
        f"show in {len(record['runs'])} seeds.",
        _circumstances(record, record["case"]),
    ]


def _run(record: dict[str, Any]) -> list[str]:
    """Of keep_run.py: what a run of `fastres train` came to."""
    result = record["result"]
    note = f"; {record['note']}" if record["note"] else ""
    return [
        "| run | epochs | images/s in training | training time | validation | test accuracy |",
        "|---|---:|---:|---:|---:|---:|",
        f"| {record['case']} | {result['epochs']} | {record['images_per_second']:.0f} "
        f"| {result['seconds'] / 60:.0f} min | {result['valid_accuracy']:.2%} "
        f"| **{result['test_accuracy']:.2%}** |",
        "",
        _circumstances(record, f"medians of {result['epochs']} epochs{note}"),
    ]


SPECIAL = {"epoch": _epoch, "seeds": _seeds, "run": _run}


def _roofline(records: list[dict[str, Any]], case: str) -> list[str]:
    """Of every case, or of `case`, fastres's time by kind of layer."""
    chosen = [r for r in records if "layers" in r and case in ("", r["case"])]
    if not chosen:
        raise ValueError(f"no layers of {case or 'any case'!r}")
    lines: list[str] = []
    for record in chosen:
        lines += [
            f"{record['case']}:",
            "",
            "| " + " | ".join(layers.HEADINGS) + " |",
            "|---|" + "---:|" * (len(layers.HEADINGS) - 1),
            *("| " + " | ".join(layers.cells(line)) + " |" for line in record["layers"]),
            "",
            f"{layers.verdict(record['layers'], record['peaks'])}.",
            "",
        ]
    return [*lines, _circumstances(chosen[0], f"medians of {chosen[0]['rounds']} passes")]


def markdown(records: list[dict[str, Any]], suite: str) -> str:
    """The table of one suite (or of a roofline), and the circumstances of its numbers below it.

    Raises:
        ValueError: there is no record of the suite.
    """
    what, _, case = suite.partition(":")
    if what == "roofline":
        return "\n".join(_roofline(records, case)) + "\n"
    chosen = [record for record in records if record["suite"] == suite]
    if not chosen:
        raise ValueError(f"no record of suite {suite!r}")
    if suite in SPECIAL:
        return "\n".join(SPECIAL[suite](chosen[0])) + "\n"
    lines = [
        f"| case | fastres | {chosen[0]['yardstick']} | best rival "
        f"| {chosen[0]['yardstick']} / fastres | best rival / fastres |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for record in chosen:
        rival = record["best_rival"]
        compared = record.get("peak_bytes") or record["times"]
        yardstick = record["yardstick"]
        eager = _cell(record, yardstick) if yardstick in compared else ""
        best = f"{_cell(record, rival)} ({rival})" if rival else "none"
        lines.append(
            f"| {record['case']} | {_cell(record, record['fastres'])} | {eager} | {best} "
            f"| {_number(record['ratio_eager'])} | {_number(record['ratio'])} |"
        )
    first = chosen[0]
    measure = (
        "peak bytes of a step" if "peak_bytes" in first else f"medians of {first['rounds']} rounds"
    )
    lines += ["", _circumstances(first, measure)]
    return "\n".join(lines) + "\n"


def filled(document: str) -> str:
    """`document` with every marked place written anew.

    A place that is empty may wait for its file; numbers without their file are an error.

    Raises:
        FileNotFoundError: a place has contents, and its file is not there.
    """

    def place(match: re.Match[str]) -> str:
        if not match["body"] and not (ROOT / match["file"]).exists():
            return match[0]
        records = json.loads((ROOT / match["file"]).read_text())
        return match["open"] + markdown(records, match["suite"]) + match["close"]

    return PLACE.sub(place, document)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("file", type=Path, nargs="+", help="JSON files, or documents")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--update", action="store_true", help="write the documents' tables anew")
    what.add_argument("--check", action="store_true", help="fail where a document is out of date")
    options = parser.parse_args(arguments)
    status = 0
    for path in options.file:
        text = path.read_text()
        if options.check or options.update:
            new = filled(text)
            if new != text and options.update:
                path.write_text(new)
            elif new != text:
                print(f"{path}: tables are out of date: python bench/table.py --update {path}")
                status = 1
            continue
        records = json.loads(text)
        for suite in dict.fromkeys(record["suite"] for record in records):
            print(f"{suite}\n\n{markdown(records, suite)}")
        if any("layers" in record for record in records):
            print(f"roofline\n\n{markdown(records, 'roofline')}")
    return status


if __name__ == "__main__":
    sys.exit(main())

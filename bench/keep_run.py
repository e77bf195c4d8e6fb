"""Keep what a run of `fastres train` came to under bench/results/, for tables and for good.

    python bench/keep_run.py runs/NAME --into bench/results/NAME --commit HASH --note "..."

It copies the metrics and the pictures, and writes config.json without this machine's paths and
record.json: settings, result, and the circumstances that a number must stand beside, which are this
machine's: run it where the run was.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
from pathlib import Path
from typing import Any

from harness import circumstances, write_json

from fastres.report import RunRecord, read_run
from fastres.train.files import write_json as write_plain
from fastres.train.model import resolve_device
from fastres.train.run_folder import RunFolder

FIGURES = ("epochs", "ended_by", "best_epoch", "valid_accuracy", "test_loss", "test_accuracy",
           "seconds")  # fmt: skip


def record(run: RunRecord, finished: float, commit: str, note: str) -> dict[str, Any]:
    """What is written of a run that ended at `finished`, in seconds since 1970."""
    if run.result is None:
        raise SystemExit(f"the run in {run.path} is not finished: there is no result.json")
    name = run.settings
    date = datetime.datetime.fromtimestamp(finished, datetime.timezone.utc)
    return {
        "suite": "run",
        "case": f"{name['recipe']}, {name['model']}, {name['data']}, amp {name['amp']}",
        "settings": name,
        "result": {figure: run.result[figure] for figure in FIGURES},
        "images_per_second": run.images_per_second,
        "note": note,
        **circumstances(resolve_device(name["device"]).type),
        "commit": commit,
        "date": date.isoformat(timespec="seconds"),
    }


def main(arguments: list[str] | None = None) -> None:
    """Write the files of one run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--into", type=Path, required=True, help="where to keep it")
    parser.add_argument("--commit", required=True, help="of the checkout that trained")
    parser.add_argument("--note", default="", help="what else a reader must know of the run")
    options = parser.parse_args(arguments)
    run, folder = read_run(options.run), RunFolder(options.run)
    finished = folder.result.stat().st_mtime if folder.result.exists() else 0.0
    found = record(run, finished, options.commit, options.note)
    options.into.mkdir(parents=True, exist_ok=True)
    for path in (folder.metrics_csv, folder.curves, folder.confusion):
        shutil.copy(path, options.into)
    write_plain(options.into / folder.config.name, run.settings)
    write_json([found], options.into / "record.json")
    print(f"{options.into}: {run.result['test_accuracy']:.2%} of the test images are right")


if __name__ == "__main__":
    main()

"""`fastres train | eval | predict | export | report | tune | env`: arguments only."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from fastres import env, train, tune
from fastres.data import DataError
from fastres.export import ExportConfig, ExportError, export
from fastres.report import ReportConfig
from fastres.report import report as write_report
from fastres.train import RECIPES, EvalConfig, PredictConfig, TrainConfig, report
from fastres.train.config import RecipeName
from fastres.train.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """Versions, what the CPU can do, and which operation runs on what."""


COMMANDS: dict[str, Any] = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "predict": PredictConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "tune": tune.TuneConfig,
    "env": EnvConfig,
}


@dataclasses.dataclass(frozen=True)
class _Start:
    """The options of `fastres train` that say where its other settings come from."""

    recipe: RecipeName = "standard"
    out: Path | None = None
    resume: tyro.conf.FlagCreatePairsOff[bool] = False


# What a user can put right: one line, no traceback.
KNOWN_ERRORS = (
    train.ConfigError,
    DataError,
    train.TrainError,
    ExportError,
    tune.TuneError,
    OSError,
)


def parse(arguments: Sequence[str]) -> Any:
    """The config of the command in `arguments`.

    The settings of `train` that are not given are those of the recipe, with --resume those of the
    run in --out.
    """
    if list(arguments[:1]) == ["train"]:
        prog, rest = "fastres train", arguments[1:]
        start, _ = tyro.cli(_Start, prog=prog, args=rest, return_unknown_args=True, add_help=False)
        default = RECIPES[start.recipe]
        if start.resume and start.out is not None:
            default = RunFolder.existing(start.out).read_config()
        return tyro.cli(TrainConfig, prog=prog, args=rest, default=default)
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="fastres",
        description="ResNets made fast without changing their answers.",
        args=arguments,
    )


def run(config: Any) -> None:
    """Do what `config` asks for."""
    if isinstance(config, EnvConfig):
        env.main()
    elif isinstance(config, tune.TuneConfig):
        tune.main(config)
    elif isinstance(config, TrainConfig):
        train.fit(config)
    elif isinstance(config, EvalConfig):
        report.print_evaluation(config.checkpoint, *train.evaluate_checkpoint(config))
    elif isinstance(config, ExportConfig):
        print(export(config))
    elif isinstance(config, ReportConfig):
        print(f"{write_report(config)}: {len(config.runs)} run{'s' * (len(config.runs) > 1)}")
    else:
        report.print_predictions(train.predict(config), as_json=config.json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0, 1 if nobody reads on, 2 for a user's error, 130 if interrupted.
    """
    try:
        run(parse(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
        return 1
    except train.RunInterruptedError as error:
        if os.environ.get("RANK", "0") == "0":  # one of several processes speaks for all
            print(f"fastres: {error}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:  # outside a run's steps, where there is nothing to save
        if os.environ.get("RANK", "0") == "0":
            print("fastres: stopped", file=sys.stderr)
        return 130
    except train.PeerError:
        return 2
    except KNOWN_ERRORS as error:
        print(f"fastres: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0

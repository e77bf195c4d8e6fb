"""What a run shows while it goes on: one live block on a terminal, plain lines in a log."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastres.train.loop import Result
from fastres.train.meter import Meter
from fastres.train.report import Report

LINE: dict[str, Any] = {
    "epoch": 12,
    "train_loss": 1.5,
    "train_accuracy": 0.25,
    "valid_loss": 1.25,
    "valid_accuracy": 0.5,
    "lr": 0.02,
    "images_per_second": 4128.6,
    "seconds": 9.84,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def become_stdout(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """`stream` as the standard output, 64 columns wide. Not in a fixture: pytest would undo it."""
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "64")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)


def show(folder: Path) -> Report:
    """A run's twelfth epoch and its end."""
    meter = Meter(step=300, images=38_400, loss=38_400 * 1.2345, seconds=9.3)
    result = Result(folder, folder, 12, "all done", 12, 1.25, 0.5, 1.3, 0.4875, 99.5, [LINE])
    report = Report(100, 313, enabled=True)
    with report:
        report.start("a run begins")
        report.begin_epoch(11, 0)
        report.training_step(meter)
        report.progress.refresh()
        report.end_epoch(LINE, best=True)
    report.end(result)
    return report


def test_terminal_gets_a_live_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    become_stdout(output := Terminal(), monkeypatch)
    show(tmp_path)
    assert "\x1b[" in output.getvalue()
    assert "ETA" in output.getvalue()


def test_file_gets_whole_lines_and_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become_stdout(output := io.StringIO(), monkeypatch)
    folder = tmp_path / ("long" * 20)
    show(folder)
    text = output.getvalue()
    assert all(character.isprintable() or character == "\n" for character in text)
    lines = text.splitlines()
    assert lines[0] == "a run begins"
    assert lines[1] == (
        "epoch  12/100  train 1.5000 25.00%  valid 1.2500 50.00%"
        "  lr 0.02  4,129 images/s  9.8 s  best"
    )
    assert any("test accuracy" in line and "48.75%" in line for line in lines)
    assert lines[-1] == f"all of it is in {folder}"
    assert "ETA" not in text


def test_nothing_is_cut_off_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become_stdout(Terminal(), monkeypatch)
    report = show(tmp_path)
    become_stdout(page := io.StringIO(), monkeypatch)
    Console(width=64).print(report.progress.get_renderable())
    run, epoch = page.getvalue().splitlines()
    assert "…" not in run + epoch
    assert run.startswith("run ") and "ETA" in run and " 11%" in run
    assert epoch.startswith("epoch 12/100 ") and " 96%" in epoch
    assert "loss 1.234  4,129 images/s ETA" in epoch


def test_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    become_stdout(output := Terminal(), monkeypatch)
    with Report(1, 1, enabled=False) as report:
        report.start("nothing")
        report.end_epoch(LINE, best=False)
    assert output.getvalue() == ""

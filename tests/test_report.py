"""The page that compares runs: complete, by itself, and safe with any name."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastres import train
from fastres.cli import main
from fastres.report import ReportConfig, read_run, render, report
from fastres.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, chart

EVIL = '<script>alert("1")</script>'
# Elements of HTML that have no end tag.
EMPTY = {"meta", "img", "br"}


class Page(HTMLParser):
    """The elements, their attributes and the text of a page, whose tags must all be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f" {data}" if "style" not in self.open else ""

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def png() -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def make_run(
    path: Path,
    *,
    finished: bool = True,
    classes: tuple[str, ...] = ("cat", "dog"),
    accuracy: float = 0.5,
    **settings: Any,
) -> Path:
    """A run's folder, with everything in it that the report reads."""
    path.mkdir(parents=True)
    config = {"model": "resnet18", "data": "sample", "lr": 0.02, "out": str(path), "root": "x"}
    (path / "config.json").write_text(json.dumps({**config, **settings}))
    history = [
        {
            "epoch": epoch,
            "train_loss": 2 / epoch,
            "valid_loss": 2.5 / epoch,
            "train_accuracy": 0.1 * epoch,
            "valid_accuracy": 0.09 * epoch,
            "lr": 0.02,
            "images_per_second": 100.0 * epoch,
            "seconds": 70.0,
        }
        for epoch in (1, 2, 3)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    if finished:
        result = {
            "epochs": 3,
            "ended_by": "all done",
            "best_epoch": 3,
            "valid_accuracy": 0.27,
            "test_loss": 1.2345,
            "test_accuracy": accuracy,
            "seconds": 210.0,
        }
        (path / "result.json").write_text(json.dumps(result))
        n = len(classes)
        mistake = {
            "image": "test 7",
            "label": classes[1],
            "predicted": classes[0],
            "probability": 0.75,
            "loss": 1.5,
            "png": png(),
        }
        confusion = [[8 if row == column else 2 for column in range(n)] for row in range(n)]
        test = {"classes": classes, "confusion": confusion, "wrongest": [mistake]}
        (path / "test.json").write_text(json.dumps(test))
    return path


def page_of(*paths: Path) -> Page:
    return Page(render([read_run(path) for path in paths]))


def test_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=0.1))
    names = {tag for tag, _ in page.elements}
    assert not names & {"script", "link", "iframe", "object", "base", "form"}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "xlink:href"):
            assert (attributes.get(name) or "data:image/png;base64,").startswith("data:image/png;")
    style = render([read_run(tmp_path / "a")])
    assert not re.search(r"url\(|@import|https?:", style)
    assert "prefers-color-scheme: dark" in style
    assert 'name="viewport"' in style


def test_results_settings_curves_confusion_and_images(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", accuracy=0.5, seed=4)
    two = make_run(tmp_path / "two", accuracy=0.625, seed=4, lr=0.1)
    page = page_of(one, two)
    text = " ".join(page.text.split())
    assert "2 runs" in text
    assert "one 50.00% 1.2345 27.00% 3 3 200 3 min 30 s resnet18, sample" in text
    bold = [a for tag, a in page.elements if tag == "td" and "best" in (a.get("class") or "")]
    assert len(bold) == 1
    settings = text[text.index("Settings setting") :]
    assert settings.startswith("Settings setting one two lr 0.02 0.1 the same in all runs model")
    assert "seed 4" in settings
    assert str(tmp_path) not in settings
    assert page.count("svg") == 3
    assert page.count("polyline") == 2 * (2 + 2 + 1)  # both runs: two parts twice, one lr
    assert "Confusion" in text and "cat 8 2" in text and "dog 2 8" in text
    assert page.count("img") == 2
    assert "cat 75% is dog" in text


def test_one_run_shows_all_its_settings(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "only", momentum=0.875))
    text = " ".join(page.text.split())
    assert text.count("Run only") == 1
    assert "momentum 0.875" in text
    assert ("details", {"open": None}) in page.elements


def test_unfinished_run_beside_a_finished_one(tmp_path: Path) -> None:
    begun = make_run(tmp_path / "begun", finished=False)
    (tmp_path / "begun" / "metrics.jsonl").unlink()
    page = page_of(make_run(tmp_path / "done"), begun)
    assert "begun not finished 0" in " ".join(page.text.split())
    page_of(begun)  # no epoch at all


def test_names_are_escaped(tmp_path: Path) -> None:
    first = make_run(tmp_path / EVIL.replace("/", ""), classes=(EVIL, "b"), model=EVIL)
    page = page_of(first, make_run(tmp_path / "<b>", data='"><img src=x onerror=alert(1)>'))
    assert page.count("script") == 0
    assert page.count("b") == 0
    assert page.count("img") == 2
    assert EVIL in page.text


def test_same_names_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run"))
    assert str(tmp_path / "x" / "run") in page.text
    assert "All settings are the same." in page.text


def test_many_classes_become_a_list_of_pairs(tmp_path: Path) -> None:
    classes = tuple(f"class {number}" for number in range(31))
    page = page_of(make_run(tmp_path / "run", classes=classes))
    assert "Most confused, of 31 classes" in page.text
    assert not any("confusion" in (a.get("class") or "") for _, a in page.elements)


class TestChart:
    def test_lines_stay_in_their_box_and_ticks_say_where(self) -> None:
        points = tuple((float(x), y) for x, y in enumerate((0.3, 12.0, 7.5), start=1))
        made = chart("t", [Series("s", 0, False, points)], suffix="%")
        ((piece),) = made.lines[0].pieces
        assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in piece)
        ticks = {text: y for y, text in made.y_ticks}
        zero, ten = ticks["0%"], ticks["10%"]
        for (_, y), (_, value) in zip(piece, points, strict=True):
            assert y == pytest.approx(zero + (ten - zero) * value / 10, abs=0.11)
        assert [text for _, text in made.x_ticks] == ["1", "2", "3"]

    def test_gaps_single_values_and_nothing(self) -> None:
        nan = float("nan")
        points = ((1.0, 1.0), (2.0, nan), (3.0, 1.0), (4.0, 1.0))
        made = chart("t", [Series("s", 0, False, points)])
        assert [len(piece) for piece in made.lines[0].pieces] == [1, 2]
        assert chart("t", [Series("s", 0, False, ())]).lines[0].pieces == ()
        one = chart("t", [Series("s", 0, False, ((1.0, 0.02),))])
        assert [text for _, text in one.x_ticks] == ["1"]
        assert chart("t", [Series("s", 0, False, ((1.0, 0.0),))]).lines[0].pieces[0][0][0] > LEFT


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("config.json", None, r"no run in .*run: there is no config\.json"),
            ("config.json", "{", r"config\.json is damaged"),
            ("config.json", "[]", r"config\.json is damaged: it has no dict"),
            ("metrics.jsonl", "{}\n", r"metrics\.jsonl is damaged: it lacks epoch, train_loss"),
            ("result.json", '{"epochs": 3}', r"result\.json is damaged: it lacks best_epoch"),
            ("test.json", "{}", r"test\.json is damaged: it lacks classes, confusion, wrongest"),
        ],
    )
    def test_file_is_named(self, name: str, text: str | None, message: str, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run")
        (run / name).unlink()
        if text is not None:
            (run / name).write_text(text)
        with pytest.raises(train.RunFolderError, match=message):
            report(ReportConfig((run,), tmp_path / "r.html"))
        assert not (tmp_path / "r.html").exists()

    def test_config(self, tmp_path: Path) -> None:
        with pytest.raises(train.ConfigError, match="runs is "):
            ReportConfig(())
        with pytest.raises(train.ConfigError, match="expected a file in a folder that exists"):
            ReportConfig((tmp_path,), tmp_path / "none" / "r.html")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make_run(tmp_path / name)) for name in ("a", "b")]
    out = tmp_path / "r.html"
    assert main(["report", *runs, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 2 runs\n"
    Page(out.read_text())
    assert main(["report", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "no run in" in capsys.readouterr().err

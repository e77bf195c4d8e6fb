"""The documentation site: its snippets run, its commands parse, its pictures are up to date."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastres
from fastres import cli

ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.S | re.M)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_snippets(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each by itself, as it would be pasted; a text after it is what it prints."""
    monkeypatch.chdir(tmp_path)
    both = r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?"
    for block, printed in re.findall(both, PAGES[page], flags=re.S | re.M):
        exec(compile(block, f"docs/{page}.md", "exec"), {"__name__": "__main__"})
        said = capsys.readouterr().out
        assert not printed or said == printed


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")])
def test_commands(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of fastres parse; the files that the others run are there."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines() if line]
    if any("--resume" in line for line in lines):
        config = fastres.train.TrainConfig(out=tmp_path / "runs" / "first")
        fastres.train.run_folder.RunFolder.create(config)
    monkeypatch.chdir(tmp_path)
    for line in lines:
        program, *words = shlex.split(line)
        if program == "fastres":
            cli.parse(words)
        for word in words:
            if word.startswith(("bench/", "examples/", "tools/")):
                assert (ROOT / word).exists(), line


def test_the_recipes_on_the_page_are_those_of_the_package() -> None:
    recipes = fastres.train.RECIPES
    section = PAGES["training"].split("## Recipes\n")[1].split("\n## ")[0]
    header, _, *rows = (
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    )
    assert header[1:-1] == list(recipes)
    names = [row[0].removeprefix("--").replace("-", "_") for row in rows]
    for name, row in zip(names, rows, strict=True):
        values = [getattr(recipe, name) for recipe in recipes.values()]
        words = {"True": "yes", "False": "no"}
        assert row[1:-1] == [words.get(str(value), str(value)) for value in values], name
    for recipe in recipes.values():  # no part of a recipe is left out
        changed = {
            field.name
            for field in dataclasses.fields(recipe)
            if getattr(recipe, field.name) != getattr(recipes["standard"], field.name)
        }
        assert changed - {"recipe", "recipe_version"} <= set(names)  # which name it, not its parts


def test_the_reasons_on_the_page_are_those_of_fuse_model() -> None:
    """By the words between what is filled in."""
    sources = "".join(path.read_text() for path in (ROOT / "fastres" / "fuse").glob("*.py"))
    table = PAGES["fuse_model"].split("## Why a layer")[1]
    for reason in re.findall(r"^\| `(.+?)` \|", table, flags=re.M):
        for words in re.split(r"NAME \(CLASS\)|CLASS|ERROR|'\w+'", reason):
            assert words.removeprefix("the forward of NAME").strip() in sources, reason


def test_every_public_op_is_in_the_reference() -> None:
    documented = re.findall(r"^\.\. autofunction:: (\w+)$", PAGES["ops"], flags=re.M)
    assert sorted(documented) == sorted(fastres.ops.__all__)


def test_every_page_is_in_the_navigation() -> None:
    trees = re.findall(r"^```{toctree}\n(.*?)^```", PAGES["index"], flags=re.S | re.M)
    listed = [line for tree in trees for line in tree.splitlines() if line and line[0] != ":"]
    assert sorted([*listed, "index"]) == sorted(PAGES)


class TestDataflow:
    """tools/draw_dataflow.py counts what the blocks really do."""

    tool: Any = load(ROOT / "tools" / "draw_dataflow.py")
    activation = 4 * 16 * 64 * 56 * 56
    weight = 4 * 64 * 64 * 9

    def moved(self, side: str, training: bool) -> tuple[int, int]:
        passes, _ = self.tool.record(self.tool.SIDES[side], training)
        return len(passes), sum(one.nbytes for one in passes)

    def test_bytes_of_inference(self) -> None:
        vector = 4 * 64
        # Two convolutions, two BatchNorms, two ReLUs: in and out; the add has two inputs.
        # torch's BatchNorm gives two vectors of statistics beside its result.
        plain = (6 * 2 + 3) * self.activation + 2 * self.weight + 2 * (4 + 2) * vector
        assert self.moved("torch, op by op", False) == (7, plain)
        fused = 5 * self.activation + 2 * self.weight + 2 * 4 * vector
        assert self.moved("fastres", False) == (2, fused)

    def test_training_moves_less(self) -> None:
        (many, plain), (few, fused) = (self.moved(side, True) for side in self.tool.SIDES)
        assert few < many and fused < plain

    def test_a_tensor_changed_in_place_is_another(self) -> None:
        passes, input = self.tool.record(self.tool.SIDES["torch, op by op"], False)
        flows = self.tool._flows(passes, input, self.activation)
        assert (-1, 5) in flows  # the shortcut
        assert {(i - 1, i) for i in range(len(passes) + 1)} | {(-1, 5)} == set(flows)

    @pytest.mark.parametrize("name", ["dataflow-inference", "dataflow-training", "bytes-training"])
    def test_pictures_are_up_to_date(self, name: str, tmp_path: Path) -> None:
        """By their words and figures: where the lines are is matplotlib's affair."""
        self.tool.write(self.tool.FIGURES[name](), tmp_path / "new.svg")
        new, kept = (
            sorted(re.findall(r">([^<>\n]*\w[^<>\n]*)</t", path.read_text(encoding="utf-8")))
            for path in (tmp_path / "new.svg", ROOT / "docs" / f"{name}.svg")
        )
        assert any("passes" in text for text in new)
        assert new == kept


def test_gradient_norms_by_depth(tmp_path: Path) -> None:
    """Small, the plain network with BatchNorm is already the one whose gradients grow most."""
    example: Any = load(ROOT / "examples" / "gradient_norm_by_depth.py")
    out = tmp_path / "norms.svg"
    norms = example.main(["--out", str(out), "--images", "8", "--blocks", "3", "--size", "8"])
    growth = {name: values[0] / values[-1] for name, values in norms.items()}
    assert [len(values) for values in norms.values()] == [12] * 4
    assert growth["plain, BatchNorm"] > 4 * growth["residual, BatchNorm"]
    assert growth["plain"] < 1 < growth["residual, BatchNorm"]
    assert "residual, BatchNorm" in out.read_text(encoding="utf-8")


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "pydata_sphinx_theme", "sphinx_copybutton"):
        pytest.importorskip(package, reason="pip install -e '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html"))
    # Nothing is loaded from elsewhere: no script, style sheet, font or picture.
    assert not re.findall(r"<(?:script|img|link)\b[^>]*(?:src|href)=\"(?:https?:)?//", pages)

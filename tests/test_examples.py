"""The examples run, and the model in them learns."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {"own_loop": (), "with_lightning": ("lightning",),
         "with_transformers": ("transformers", "accelerate")}  # fmt: skip


def test_every_example_is_run() -> None:
    elsewhere = {"gradient_norm_by_depth"}  # tests/test_docs.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS, *elsewhere}


@pytest.mark.parametrize("name", NEEDS)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On so few images that a test takes seconds, but with every line of the script."""
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[examples]'")
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss, accuracy = module.main(train_images=16, test_images=16, epochs=8, batch_size=16)
    assert loss < 0.8 * math.log(10)  # what it began with: of ten classes it knew nothing
    assert 0 <= accuracy <= 1
    assert list(tmp_path.iterdir()) == []

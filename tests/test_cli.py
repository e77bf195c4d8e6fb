"""The command line, as a stranger meets it."""

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastres import data, train
from fastres.cli import main, parse
from fastres.train.run_folder import RunFolder

OPTIONS = """
    --recipe --model --data --root --epochs --batch-size --lr --schedule --warmup --step-size
    --gamma --momentum --nesterov --no-nesterov --weight-decay --decay-norm --no-decay-norm
    --label-smoothing --flip --cutout --ema --seed --valid-ratio --patience --device --amp
    --channels-last --no-channels-last --sync-bn --fused --no-fused --out --resume
    --test-ratio --image-size --stem --workers --weights --freeze --tensorboard
"""


def module(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m fastres ARGUMENTS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fastres", *arguments], capture_output=True, text=True
    )


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `fastres ARGUMENTS`."""
    try:
        code = main(arguments.split())
    except SystemExit as stop:  # how the argument parser ends
        code = int(stop.code or 0)
    output = capsys.readouterr()
    return code, output.out, output.err


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 training and 20 test images in the sample's place."""
    whole = data.sample()
    few = data.Dataset(whole.train[torch.arange(40)], whole.test[torch.arange(20)])
    for name in ("loop", "inference"):
        monkeypatch.setattr(f"fastres.train.{name}.load", lambda name, root: few)


class TestOptions:
    def test_train_has_every_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, help_text, _ = run("train --help", capsys)
        assert code == 0
        assert [option for option in OPTIONS.split() if option not in help_text] == []

    def test_help_lists_the_commands(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, help_text, _ = run("--help", capsys)
        assert code == 0
        for command in ("train", "eval", "predict", "env"):
            assert f"• {command} " in help_text

    def test_every_option_reaches_the_config(self, monkeypatch: pytest.MonkeyPatch) -> None:
        configs: list[train.TrainConfig] = []
        monkeypatch.setattr(train, "fit", configs.append)
        arguments = (
            "train --model resnet34 --data cifar10 --root r --epochs 2 --batch-size 3 --lr 0.4 "
            "--momentum 0.5 --weight-decay 0.6 --step-size 7 --gamma 0.8 --seed 9 "
            "--valid-ratio 0.3 --patience 11 --device cpu --amp bf16 --no-fused --out o "
            "--stem imagenet --workers 0 --test-ratio 0.4 "
            "--schedule cosine --warmup 0.1 --nesterov --no-decay-norm --label-smoothing 0.05 "
            "--flip alternating --cutout 5 --ema 0.9 --no-channels-last"
        )
        assert main(arguments.split()) == 0
        assert configs == [
            train.TrainConfig(
                model="resnet34",
                data="cifar10",
                root=Path("r"),
                epochs=2,
                batch_size=3,
                lr=0.4,
                momentum=0.5,
                weight_decay=0.6,
                step_size=7,
                gamma=0.8,
                seed=9,
                valid_ratio=0.3,
                patience=11,
                device="cpu",
                amp="bf16",
                fused=False,
                out=Path("o"),
                stem="imagenet",
                workers=0,
                test_ratio=0.4,
                schedule="cosine",
                warmup=0.1,
                nesterov=True,
                decay_norm=False,
                label_smoothing=0.05,
                flip="alternating",
                cutout=5,
                ema=0.9,
                channels_last=False,
            )
        ]


class TestRecipes:
    def parsed(self, arguments: str) -> Any:
        return parse(arguments.split())

    def test_recipe_gives_the_settings_that_are_not_given(self) -> None:
        config = self.parsed("train --epochs 10 --recipe best --lr 0.3 --nesterov")
        assert config == train.recipe("best", epochs=10, lr=0.3)
        assert self.parsed("train") == train.TrainConfig() == train.RECIPES["standard"]

    def test_help_shows_the_recipes_defaults(self, capsys: pytest.CaptureFixture[str]) -> None:
        lines = {}
        for name, config in train.RECIPES.items():
            code, help_text, _ = run(f"train --recipe {name} --help", capsys)
            assert code == 0
            assert f"(default: {config.schedule})" in " ".join(help_text.split())
            assert f"(default: {config.epochs})" in " ".join(help_text.split())
            assert "recipe-version" not in help_text
            lines[name] = help_text
        assert lines["standard"] != lines["best"] != lines["best-short"]

    def test_resume_keeps_the_runs_own_settings(self, tmp_path: Path) -> None:
        started = train.recipe("best", epochs=10, cutout=3, out=tmp_path)
        RunFolder.create(started)
        resumed = self.parsed(f"train --resume --out {tmp_path}")
        assert resumed == dataclasses.replace(started, resume=True)
        assert self.parsed(f"train --out {tmp_path} --resume --epochs 12").epochs == 12

    def test_unknown_recipe(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, _, error = run("train --recipe worst", capsys)
        assert code == 2
        for word in ("--recipe", "standard", "best-short"):
            assert word in error


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("train --lr -1", "lr is -1.0, expected a number above 0"),
            ("train --epochs many", "--epochs"),
            ("train --model vgg", "--model"),
            ("train --speed 9", "Unrecognized options: --speed"),
            ("train --resume", "resume is True, expected --out DIR beside it"),
            ("predict --checkpoint c.pt", "images is (), expected at least one image file"),
            ("eval", "--checkpoint"),
            ("fly", "fly"),
        ],
    )
    def test_wrong_arguments(
        self, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, _, error = run(arguments, capsys)
        assert code == 2
        assert message in error

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("train --resume --out none", "no run to resume in none: there is no config.json"),
            ("train --out .", ". is not empty: choose another --out, or --resume the run in it"),
            ("train --device cuda:77", "device is 'cuda:77', but torch sees"),
            ("train --valid-ratio 0.00001", "valid_ratio is 1e-05, which leaves"),
            ("eval --checkpoint none.pt", "no checkpoint at none.pt"),
            ("eval --checkpoint text.pt", "text.pt is damaged or no checkpoint of fastres"),
            ("predict text.pt --checkpoint none.pt", "no checkpoint at none.pt"),
        ],
    )
    def test_one_line_and_exit_code_2(
        self,
        arguments: str,
        message: str,
        few_images: None,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("text.pt").write_text("hello")
        code, _, error = run(arguments, capsys)
        assert code == 2
        assert error.startswith(f"fastres: error: {message}")
        assert error.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["text.pt"]

    def test_without_a_traceback_from_the_module(self, tmp_path: Path) -> None:
        done = module("eval", "--checkpoint", str(tmp_path / "none.pt"))
        assert done.returncode == 2
        assert done.stderr == f"fastres: error: no checkpoint at {tmp_path / 'none.pt'}\n"

    def test_reader_that_has_enough(self) -> None:
        prints = "lambda config: print(config)"
        script = f"from fastres import cli; cli.run = {prints}; raise SystemExit(cli.main(['env']))"
        command = [sys.executable, "-c", script]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 1

    def test_ctrl_c_where_there_is_nothing_to_save(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupted(config: train.EvalConfig) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(train, "evaluate_checkpoint", interrupted)
        assert run("eval --checkpoint c.pt", capsys) == (130, "", "fastres: stopped\n")

    def test_interrupted_run_says_how_to_go_on(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fit(config: train.TrainConfig) -> None:
            raise train.RunInterruptedError(Path("runs/x"))

        monkeypatch.setattr(train, "fit", fit)
        code, _, error = run("train", capsys)
        assert code == 130
        assert error == "fastres: stopped; go on with: fastres train --out runs/x --resume\n"


def test_whole_road(
    few_images: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """train, train --resume, eval and predict through `python -m fastres`, with a real ResNet."""

    def fastres(arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fastres", *arguments.split()])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("fastres", run_name="__main__")
        output = capsys.readouterr()
        assert stop.value.code == 0, output.err
        return output.out

    monkeypatch.chdir(tmp_path)
    said = fastres("train --epochs 1 --batch-size 16 --seed 3 --device cpu --out run")
    assert "32 training, 8 validation, 20 test images" in said
    assert "epoch   1/1  train " in said
    assert "test accuracy" in said

    # What is not given on resuming is taken from the run: --seed 3, --batch-size 16.
    said = fastres("train --epochs 2 --out run --resume")
    assert "epoch   2/2" in said
    assert "epoch   1/2" not in said
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 2
    code, _, error = run("train --out run --resume --lr 0.5 --epochs 3", capsys)
    assert code == 2
    assert "lr (was 0.02, is 0.5)" in error

    said = fastres("eval --checkpoint run/best.pt")
    first, header, *lines = said.splitlines()
    assert first.startswith("run/best.pt: test loss ")
    assert first.endswith("(20 images of sample)")
    assert header.split()[:3] == ["class", "accuracy", "correct"]
    classes = data.sample().classes
    assert [line.split()[0] for line in lines] == list(classes)
    assert all(line.split()[3:5] == ["of", "2"] for line in lines)

    Path("ships/more").mkdir(parents=True)
    for name in ("ships/b.png", "ships/more/a.jpg", "ships/.hidden.png"):
        Image.new("RGB", (60, 40), "navy").save(name)
    Path("ships/notes.txt").write_text("no image, and no image's name")
    said = fastres("predict ships ships/b.png --checkpoint run/best.pt --top 2 --batch-size 2")
    header, *lines = said.splitlines()
    assert header.split() == ["image", "class", "1", "class", "2"]
    files = ["ships/b.png", "ships/more/a.jpg", "ships/b.png"]
    assert [line.split()[0] for line in lines] == files
    for line in lines:
        _, one, most, other, less = line.split()
        assert {one, other} < set(classes)
        assert most.endswith("%") and less.endswith("%")

    plain = json.loads(fastres("predict ships --checkpoint run/best.pt --json --top 99"))
    assert [line["image"] for line in plain] == files[:2]
    assert [entry["class"] for entry in plain[0]["classes"]][:2] == [one, other]
    assert sum(entry["probability"] for entry in plain[0]["classes"]) == pytest.approx(1, abs=1e-5)

"""The choice of a convolution's kernel on a GPU, with times and cards that are made up."""

import json
from pathlib import Path

import pytest
import torch

from fastres import tune
from fastres.cli import main
from fastres.kernels import _estimate as estimate
from fastres.kernels import _tiles as tiles
from fastres.kernels import choice
from fastres.kernels.choice import ConvKey

BF16 = torch.bfloat16
CPU = torch.device("cpu")
FIRST = ConvKey.parse(
    "conv_bn_relu 16-bit input 8x64x56x56 weight 64x64x3x3 stride 1x1 padding 1x1"
)
SECOND = FIRST._replace(op="bn_conv_stats", c_out=256, kernel=(1, 1), padding=(0, 0))
THIRD = FIRST._replace(op="conv_bn_add_relu", n=3)
BACKWARD = SECOND._replace(op="bn_conv_stats_backward")


@pytest.fixture(autouse=True)
def no_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a user's nor a shipped table, and nothing remembered of them."""
    monkeypatch.setattr(choice, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("FASTRES_GPU_CONV", "FASTRES_GPU_TABLE"):
        monkeypatch.delenv(name, raising=False)
    choice.forget_tables()


def write(path: Path, choices: dict, target: str = "sm_90", measured: bool = True) -> Path:
    seconds = {key: {name: 1.0} for key, name in choices.items()} if measured else None
    tune.write_table(path, target, choices, seconds, "a card")
    choice.forget_tables()
    return path


class TestKeys:
    @pytest.mark.parametrize("key", [FIRST, SECOND, THIRD])
    def test_text_and_back(self, key: ConvKey) -> None:
        assert ConvKey.parse(str(key)) == key

    @pytest.mark.parametrize(
        "text", ["", "conv", str(FIRST) + " ", str(FIRST).replace("conv_bn", "x"), "a " * 10]
    )
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(ValueError, match="no convolution's key"):
            ConvKey.parse(text)

    def test_of_a_model(self) -> None:
        keys = tune.conv_keys("resnet18", 32, 4, True, BF16)
        assert str(keys[0]) == (
            "conv_stats 16-bit input 4x3x32x32 weight 64x3x3x3 stride 1x1 padding 1x1"
        )
        assert {key.op for key in keys[::2]} == {"conv_stats", "bn_conv_stats"}
        assert keys[1::2] == [key._replace(op=f"{key.op}_backward") for key in keys[::2]]
        keys = tune.conv_keys("resnet50", 224, 1, False, BF16)
        assert {key.op for key in keys} == {"conv_bn_relu", "conv_bn_add_relu", "conv_bn"}
        assert len(keys) == len(set(keys)) < 53

    def test_rows(self) -> None:
        assert FIRST.rows == 8 * 56 * 56
        assert FIRST._replace(stride=(2, 2)).rows == 8 * 28 * 28


class TestCandidates:
    def test_the_wide_tile_has_no_registers_left(self) -> None:
        assert "triton:wide" in choice.candidates(FIRST, BF16, "sm_90")
        assert "triton:wide" not in choice.candidates(FIRST, BF16, "sm_80")
        assert "triton:wide" not in choice.candidates(FIRST, BF16, "sm_120")
        assert "triton:wide" not in choice.candidates(SECOND, BF16, "sm_90")

    def test_cudnns_fused_kernels(self) -> None:
        assert choice.candidates(FIRST, BF16, "sm_80")[-1] == "cudnn_relu"
        assert choice.candidates(THIRD, BF16, "sm_80")[-1] == "cudnn_add_relu"
        # No range for a folded weight, no ReLU at the end, another maker's card.
        assert "cudnn_relu" not in choice.candidates(FIRST, torch.float16, "sm_80")
        linear = FIRST._replace(op="conv_bn")
        assert choice.candidates(linear, BF16, "sm_80")[-1] == "cudnn"
        assert choice.candidates(FIRST, BF16, "gfx942")[-1] == "cudnn"

    def test_by_tma(self) -> None:
        key = SECOND._replace(op="conv_stats")
        names = [f"tma:{tile}" for tile in tiles.CONV_TILES]
        assert set(names) <= set(choice.candidates(key, BF16, "sm_90"))
        tf32 = key._replace(precision="tf32")
        for other in (FIRST, key._replace(stride=(2, 2)), key._replace(padding=(1, 1)), tf32):
            assert not set(names) & set(choice.candidates(other, BF16, "sm_90"))
        for target in ("sm_80", "gfx942"):
            assert not set(names) & set(choice.candidates(key, BF16, target))
        # A candidate that nobody has measured is not the choice.
        assert choice.default_choice(key, BF16, "sm_90", 132).startswith("triton")

    def test_of_the_backward(self) -> None:
        names = choice.candidates(BACKWARD, BF16, "sm_90")
        assert names == list(tiles.GRADIENTS)
        assert names[-1] == "cudnn"
        # With nine taps dz and z would be joined nine times.
        small = choice.candidates(BACKWARD._replace(kernel=(3, 3), padding=(1, 1)), BF16, "sm_90")
        assert small == [name for name in names if not name.startswith("triton_apply")]
        for other in (BACKWARD._replace(c_in=3), BACKWARD._replace(n=0)):
            assert choice.candidates(other, BF16, "sm_90") == ["cudnn"]
        exact = BACKWARD._replace(precision="fp32")
        assert choice.candidates(exact, torch.float32, "sm_90") == ["cudnn"]

    def test_without_tensor_cores_for_it(self) -> None:
        stem = FIRST._replace(c_in=3)
        ours = ["triton:tall", "triton:small"]
        assert choice.candidates(stem, BF16, "sm_90") == ["cudnn", "cudnn_relu", *ours]
        assert choice.default_choice(stem, BF16, "sm_90", 132) == "cudnn"
        assert choice.default_choice(stem, BF16, "sm_90", 132, ours=True) in ours
        for other in (stem._replace(c_in=40), stem._replace(op="bn_conv_stats")):
            assert choice.candidates(other, BF16, "sm_90")[-1].startswith("cudnn")
        exact = FIRST._replace(precision="fp32")
        assert choice.candidates(exact, torch.float32, "sm_90") == ["cudnn", "cudnn_relu"]
        for target in ("sm_75", "gfx1100"):
            assert not any("triton" in name for name in choice.candidates(FIRST, BF16, target))


class TestTables:
    def explain(self, key: ConvKey = FIRST, dtype: torch.dtype = BF16) -> tuple[str, str]:
        return choice.explain(key, dtype, CPU)

    def test_the_default_without_any(self) -> None:
        # 25,088 rows: 196 programs of the square tile would do, but 64 columns are half of it.
        assert choice.default_choice(FIRST, BF16, "sm_90", 132) == "triton:tall"
        assert choice.default_choice(FIRST, BF16, "sm_90", 1000) == "triton:small"
        assert choice.default_choice(SECOND, BF16, "sm_90", 132) == "triton:square"
        large = SECOND._replace(op="conv_stats", n=256)
        assert choice.default_choice(large, BF16, "sm_90", 132) == "triton:wide"
        assert choice.default_choice(large, BF16, "sm_80", 108) == "triton:square"
        assert self.explain() == ("triton:tall", "no table has this shape")

    def test_the_default_of_the_backward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def default(key: ConvKey, target: str = "sm_90", **ours: bool) -> str:
            return choice.default_choice(key, BF16, target, 132, **ours)

        # Bound by bytes: what is not moved twice. Bound by FLOPs: cuDNN.
        assert default(BACKWARD) == "triton_apply:tall+tall"
        wide = BACKWARD._replace(c_in=2048, c_out=512, height=7, width=7)
        assert default(wide) == "cudnn"
        assert default(wide, ours=True).startswith("triton")
        taps = BACKWARD._replace(kernel=(3, 3), padding=(1, 1))
        assert default(taps) == "cudnn"
        assert default(taps, ours=True) == "triton:tall+tall"
        # Of a card whose ceilings nobody has said nothing is estimated.
        assert default(BACKWARD, "sm_120") == "cudnn"
        assert default(BACKWARD, "sm_120", ours=True) == "triton:tall+tall"
        monkeypatch.setenv("FASTRES_GPU_CONV", "triton")
        assert self.explain(wide)[0].startswith("triton")

    def test_the_estimate_of_the_backward(self) -> None:
        """By hand, in elements moved, for a card whose FLOPs cost nothing."""
        z, x = 8 * 56 * 56 * 256, 8 * 56 * 56 * 64

        def time_of(name: str, key: ConvKey = BACKWARD, ridge: float = 1e9) -> float:
            return estimate.backward_estimate(key, tiles.GRADIENTS[name], ridge)

        # The apply pass; both products; the passes that mask and that make the activation.
        assert time_of("cudnn") == 3 * z + 2 * (z + x) + 3 * x + 2 * x
        assert time_of("triton:tall+tall") == 3 * z + (z + 2 * x) + (z + x)
        assert time_of("triton_apply:tall+tall") == (2 * z + 2 * x) + (2 * z + x)
        assert time_of("dgrad:tall") == 3 * z + (z + 2 * x) + (z + x) + 2 * x
        assert time_of("wgrad:tall") == 3 * z + (z + x) + 3 * x + (z + x)
        # FLOPs that bind, and tiles that come through L2.
        assert time_of("cudnn", ridge=1e-3) == 3 * z + 5 * x + 2 * (2 * 64 * z / 1e-3)
        nine = BACKWARD._replace(kernel=(3, 3), padding=(1, 1))
        loaded = 9 * 64 * z * (1 / 64 + 1 / 64)
        expected = 3 * z + 2 * loaded / estimate.L2_SPEED
        assert time_of("triton:small+small", nine) == expected

    def test_the_first_that_has_the_shape_decides(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path / "shipped/sm_90.json", {FIRST: "triton:small"}, measured=False)
        assert self.explain() == (
            "triton:small",
            f"estimated: {tmp_path / 'shipped/sm_90.json'}",
        )
        assert self.explain(THIRD)[1] == "no table has this shape"
        stored = write(choice.stored_path("A Card (80 GB)"), {FIRST: "cudnn_relu"})
        assert stored.name == "conv-a-card--80-gb-.json"
        assert self.explain()[0] == "triton:small"
        monkeypatch.setattr(choice, "_stored", lambda device: stored)
        assert self.explain() == ("cudnn_relu", f"measured: {stored}")
        # Of the 16-bit types float16 has not the range: the next table.
        assert self.explain(dtype=torch.float16)[0] == "triton:small"
        named = write(tmp_path / "mine.json", {FIRST: "cudnn"})
        monkeypatch.setenv("FASTRES_GPU_TABLE", str(named))
        assert self.explain()[0] == "cudnn"
        monkeypatch.setenv("FASTRES_GPU_CONV", "triton")
        assert self.explain()[0] == "triton:small"
        monkeypatch.setenv("FASTRES_GPU_CONV", "cudnn")
        assert self.explain() == ("cudnn", "FASTRES_GPU_CONV")
        monkeypatch.delenv("FASTRES_GPU_CONV")
        monkeypatch.setenv("FASTRES_GPU_TABLE", "none")
        assert self.explain()[0] == "triton:tall"

    def test_what_is_remembered(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A choice is looked up once, and again when a variable or a table has changed."""
        looked = []
        explain = choice.explain

        def watched(*arguments: object) -> tuple[str, str]:
            looked.append(arguments)
            return explain(*arguments)

        monkeypatch.setattr(choice, "explain", watched)
        x = torch.empty(8, 64, 56, 56, dtype=BF16)
        w = torch.empty(64, 64, 3, 3, dtype=BF16)

        def chosen() -> str:
            return choice.choose_conv(x, w, [1, 1], [1, 1], [1, 1], 1, FIRST.op)

        assert {chosen(), chosen()} == {choice.default_choice(FIRST, BF16, "sm_90", 1)}
        assert len(looked) == 1
        table = write(tmp_path / "mine.json", {FIRST: "triton:small"})
        monkeypatch.setenv("FASTRES_GPU_TABLE", str(table))
        assert chosen() == "triton:small"
        write(table, {FIRST: "cudnn"})
        assert chosen() == "cudnn"
        monkeypatch.setenv("FASTRES_GPU_CONV", "triton")
        assert chosen().startswith("triton")
        assert len(looked) == 4

    def test_groups_and_dilation_are_aten_s(self, tmp_path: Path) -> None:
        write(tmp_path / "shipped/sm_90.json", {FIRST: "triton:small"})
        x = torch.empty(8, 64, 56, 56, dtype=BF16, device="meta")
        w = torch.empty(64, 64, 3, 3, dtype=BF16, device="meta")

        def chosen(dilation: list[int], groups: int) -> str:
            return choice.choose_conv(x, w, [1, 1], [1, 1], dilation, groups, "conv_bn_relu")

        assert chosen([1, 1], 1) == "triton:small"
        assert chosen([1, 2], 1) == chosen([1, 1], 2) == "cudnn"

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ("{", "Expecting"),
            ("[]", "list indices"),
            ('{"target": "sm_90", "measured": true}', "'choices'"),
            ('{"target": 90, "measured": true, "choices": {}}', "target must be a string"),
            ('{"target": "sm_90", "measured": true, "choices": {"x": "cudnn"}}', "no convolution"),
            (
                json.dumps(
                    {"target": "sm_90", "measured": True, "choices": {str(FIRST): "triton:huge"}}
                ),
                "'triton:huge' is no candidate",
            ),
        ],
    )
    def test_a_damaged_one(
        self, content: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "damaged.json"
        path.write_text(content)
        monkeypatch.setenv("FASTRES_GPU_TABLE", str(path))
        with pytest.raises(ValueError, match="is no table of convolutions") as error:
            self.explain()
        assert problem in str(error.value)

    def test_a_missing_one_and_another_card_s(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FASTRES_GPU_TABLE", str(tmp_path / "none.json"))
        with pytest.raises(ValueError, match="expected a file, or none"):
            self.explain()
        path = write(tmp_path / "a100.json", {}, "sm_80")
        monkeypatch.setenv("FASTRES_GPU_TABLE", str(path))
        with pytest.raises(ValueError, match="a table for sm_80, expected sm_90"):
            self.explain()


TIMES = {"triton:tall": 3.0, "cudnn": 2.0, "cudnn_relu": 2.5}


class TestTuning:
    def test_the_fastest_wins_and_of_equals_the_earlier(self) -> None:
        runs = {name: (lambda seconds=seconds: seconds) for name, seconds in TIMES.items()}
        tied = {"first": lambda: 1.0, "second": lambda: 1.0}
        contend = {FIRST: runs, SECOND: tied, THIRD: {}}.__getitem__
        found = tune.fastest([FIRST, SECOND, THIRD], contend, lambda run: run())
        assert list(found) == [FIRST, SECOND]
        assert list(found[FIRST]) == ["cudnn", "cudnn_relu", "triton:tall"]
        assert found[FIRST] == TIMES
        assert list(found[SECOND]) == ["first", "second"]

    def test_a_whole_table(self, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        """Everything but the GPU: shapes, timing, the stored file, and what is chosen after."""
        asked = []

        def contestants(key, dtype, device, names):
            asked.append((key, dtype))
            return {name: (lambda name=name: name) for name in names}

        monkeypatch.setattr(tune, "why_no_triton", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
        monkeypatch.setattr(choice, "target_of", lambda device: "sm_90")
        monkeypatch.setattr(tune, "contestants", contestants)
        config = tune.TuneConfig(model=("resnet18",), size=32, infer=(2,), train=())
        times = {"cudnn": 0.002, "cudnn_relu": 0.003, "triton:small": 0.001}
        path = tune.tune(config, lambda run: times.get(run(), 1.0))
        assert path == choice.stored_path("A Card")
        keys = tune.keys_of(config)
        assert [key for key, _ in asked] == keys
        table = choice.read_table(path)
        assert (table.target, table.measured) == ("sm_90", True)
        assert {table.choices[key] for key in keys} == {"triton:small"}
        content = json.loads(path.read_text())
        assert content["device"] == "A Card"
        stem = {"triton:small": 0.001, "cudnn": 0.002, "cudnn_relu": 0.003, "triton:tall": 1.0}
        assert content["seconds"][str(keys[0])] == stem
        # Another size is added, and the same one anew replaces its own.
        more = tune.TuneConfig(model=("resnet18",), size=32, infer=(2, 4), train=())
        tune.tune(more, lambda run: 1.0 if run() == "cudnn" else 2.0)
        monkeypatch.setattr(choice, "_stored", lambda device: path)
        assert choice.explain(keys[1], BF16, CPU) == ("cudnn", f"measured: {path}")
        other = tune.TuneConfig(model=("resnet18",), size=64, infer=(1,), train=())
        tune.tune(other, lambda run: 1.0)
        assert set(choice.read_table(path).choices) == {*tune.keys_of(more), *tune.keys_of(other)}
        assert len(json.loads(path.read_text())["seconds"]) == len(choice.read_table(path).choices)
        assert [file.name for file in path.parent.iterdir()] == [path.name]

    def test_a_table_is_written_whole_or_not_at_all(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write(tmp_path / "table.json", {FIRST: "cudnn"})
        before = path.read_bytes()

        def full(self: Path, text: str) -> None:
            with self.open("w") as file:
                file.write(text[:10])
            raise OSError("disk full")

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="disk full"):
            tune.write_table(path, "sm_90", {SECOND: "cudnn"})
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_a_file_that_is_no_table_is_left_alone(self, tmp_path: Path, capsys) -> None:
        path = tmp_path / "mine.json"
        path.write_text("[1, 2]")
        assert main(["tune", "--estimate", "sm_90", "--out", str(path)]) == 2
        assert "is no table of convolutions" in capsys.readouterr().err
        assert path.read_text() == "[1, 2]"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--model vgg", "model is 'vgg'"),
            ("--infer 0", "infer is (0,), expected numbers above 0"),
            ("--size 8", "size is 8, expected at least 32"),
            ("--estimate sm_90", "estimate is 'sm_90', expected --out FILE beside it"),
        ],
    )
    def test_wrong_arguments(self, arguments: str, message: str) -> None:
        words = arguments.removeprefix("--").split()
        name, values = words[0], words[1:]
        given = {
            "model": tuple(values),
            "infer": tuple(int(v) for v in values if v.isdigit()),
            "size": int(values[0]) if values[0].isdigit() else 0,
            "estimate": values[0],
        }[name]
        with pytest.raises(tune.TuneError) as error:
            tune.TuneConfig(**{name: given})
        assert message in str(error.value)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
    def test_without_a_gpu(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["tune"]) == 2
        assert "tuning needs a GPU: torch sees no CUDA device" in capsys.readouterr().err


def test_what_env_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(choice, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(choice, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(choice, "_stored", lambda device: None)
    rows = tune.typical_choices()
    assert {ConvKey.parse(key).op for key, _, _ in rows} >= {"conv_stats", "conv_bn_add_relu"}
    assert {chosen for _, chosen, _ in rows} >= {"cudnn", "triton:square", "triton:small"}
    assert {why for _, _, why in rows} == {"no table has this shape", "no other kernel fits"}


@pytest.mark.parametrize("target", tune.MULTIPROCESSORS)
def test_the_tables_that_ship_are_what_they_say(
    target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Estimates, word by word what `fastres tune --estimate` writes; a measured one is longer."""
    path = Path(choice.__file__).parent / "tuned" / f"{target}.json"
    table = choice.read_table(path)
    assert table.target == target
    family = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
    out = tmp_path / "table.json"
    for config in (
        tune.TuneConfig(model=family, estimate=target, out=out),
        tune.TuneConfig(
            model=("resnet18",), size=32, infer=(512,), train=(512,), estimate=target, out=out
        ),
    ):
        tune.tune(config)
    assert set(choice.read_table(out).choices) <= set(table.choices)
    if not table.measured:
        assert path.read_text() == out.read_text()
        assert "seconds" not in json.loads(path.read_text())

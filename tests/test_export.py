"""Exported files: loaded by what users load them with, and right or not there."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres import data, train
from fastres import export as exporting
from fastres.cli import main
from fastres.export import METADATA, ExportConfig, ExportError, export
from fastres.models.resnet import BasicBlock, FusedBasicBlock, FusedResNet, ResNet
from fastres.train import checkpoint, inference
from running import run_python
from tolerances import relative_error

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is (deprecated|not supported)")
TORCH_FORMATS = ["torchscript", "pt2"]


def half_a_resnet(name: str, arguments: dict[str, Any]) -> nn.Module:
    """The first two stages: every kind of unit, in a few weights."""
    fused = arguments["fused"]
    block = FusedBasicBlock if fused else BasicBlock
    with torch.device("meta"):  # the initialisation of what is left out would take its time
        model = (FusedResNet if fused else ResNet)(block, [1, 1, 1, 1], stem="cifar")
        model.layer3, model.layer4 = nn.Identity(), nn.Identity()
        model.fc = nn.Linear(128, arguments["num_classes"])
    return model.to_empty(device="cpu")


@pytest.fixture
def best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with running statistics that are not the initial ones."""
    monkeypatch.setattr(inference, "build_model", half_a_resnet)
    arguments = {"num_classes": 10, "stem": "cifar"}
    model = half_a_resnet("resnet18", {**arguments, "fused": False})
    for value in model.state_dict().values():
        if value.dim() > 1:
            value.normal_(0, value[0].numel() ** -0.5)
        elif value.is_floating_point():
            value.uniform_(0.5, 1)
    content = {
        "model": model.state_dict(),
        "model_name": "resnet18",
        "model_arguments": arguments,
        "classes": list(data.sample().classes),
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
        "data": "sample",
        "image_size": 24,
        "resize_size": 28,
        "split": {},
    }
    checkpoint.save(tmp_path / "best.pt", content)
    return tmp_path / "best.pt"


def logits(best: Path, images: Tensor) -> Tensor:
    model, _ = train.load_model(best, fused=False)
    with torch.no_grad():
        return model(images)


def assert_only(best: Path, *names: str) -> None:
    """There is nothing in the checkpoint's folder but it and these, temporary files neither."""
    assert sorted(path.name for path in best.parent.iterdir()) == sorted(["best.pt", *names])


IMAGES = (torch.randn(2, 3, 24, 24),)
DYNAMIC = ({0: torch.export.Dim("batch")},)


def fused_model(*, later: bool) -> nn.Module:
    """Half a ResNet with a max-pool, fused as it was built or by fuse_model."""
    model = half_a_resnet("resnet18", {"fused": not later, "num_classes": 4}).eval()
    for value in model.state_dict().values():
        if value.dim() > 1:
            value.normal_(0, value[0].numel() ** -0.5)
        elif value.is_floating_point():
            value.uniform_(0.5, 1)
    model.maxpool = nn.MaxPool2d(3, 2, 1)
    return fastres.fuse_model(model) if later else model


def assert_standard(
    exported: nn.Module | torch.export.ExportedProgram, model: nn.Module, **arguments: Any
) -> None:
    """Its ONNX has standard operators alone, and the model's answers in ONNX Runtime."""
    ort = pytest.importorskip("onnxruntime")
    program = torch.onnx.export(exported, dynamo=True, **arguments)
    assert program is not None
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    session = ort.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for n in (1, 5):
        images = torch.randn(n, 3, 24, 24)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            assert relative_error(torch.from_numpy(found), model(images)) < 1e-5


def load(path: Path, extra: dict[str, Any]) -> Any:
    if path.suffix == ".pt2":
        return torch.export.load(path, extra_files=extra).module()
    return torch.jit.load(path, _extra_files=extra)


@pytest.mark.fits_in("fastres export: files for torch", "Compilers and exporters")
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("form", TORCH_FORMATS)
def test_torch_loads_it_and_gives_the_same(form: str, fused: bool, best: Path) -> None:
    out = best.parent / f"model.{form}"
    out.write_text("an older file, to be replaced")
    exported = export(ExportConfig(best, form, out, fused=fused))
    extra: dict[str, Any] = {METADATA: ""}
    loaded = load(out, extra)
    for n in (1, 2, 5):
        images = torch.randn(n, 3, 24, 24)
        with torch.no_grad():
            assert relative_error(loaded(images), logits(best, images)) < 1e-5
    graph = loaded.graph if form == "pt2" else loaded.inlined_graph
    assert ("fastres" in str(graph).replace("fastres.models", "")) == fused
    described = json.loads(extra[METADATA])
    assert described["classes"] == list(data.sample().classes)
    assert (described["mean"], described["std"]) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    assert described["resize_size"] == 28
    assert exported.bytes == out.stat().st_size
    assert exported.relative_error < 1e-5
    assert ("import fastres before" in str(exported)) == fused
    assert_only(best, out.name)


def test_frozen_where_it_is_loaded(best: Path) -> None:
    """Which packs the weights for that processor, once."""
    out = best.parent / "model.ts"
    export(ExportConfig(best, "torchscript", out, fused=True))
    loaded = torch.jit.load(out)
    assert "fastres::pack_conv_weight" in str(loaded.inlined_graph)
    frozen = torch.jit.freeze(loaded)
    assert "fastres::conv_bn_relu" in str(frozen.inlined_graph)
    assert "fastres::pack_conv_weight" not in str(frozen.inlined_graph)
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert relative_error(frozen(images), logits(best, images)) < 1e-5


def test_plain_files_need_torch_alone(best: Path) -> None:
    for form in TORCH_FORMATS:
        for fused in (False, True):
            out = best.parent / f"{form}-{fused}.pt2"
            export(ExportConfig(best, form, out, fused=fused))
    done = run_python(f"""
import os, sys, torch
os.chdir({str(best.parent)!r})
sys.modules["fastres"] = None
images = torch.zeros(1, 3, 24, 24)
runs = dict(
    torchscript=lambda path: torch.jit.load(path)(images),
    pt2=lambda path: torch.export.load(path).module()(images),
)
for form, run in runs.items():
    run(form + "-False.pt2")
    try:
        run(form + "-True.pt2")
    except Exception:
        continue
    raise AssertionError(form)
del sys.modules["fastres"]
import fastres
for form, run in runs.items():
    run(form + "-True.pt2")
""")
    assert done.returncode == 0, done.stderr


class TestOnnx:
    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        pytest.importorskip("onnxscript")

    @pytest.mark.fits_in("fastres export: ONNX, in ONNX Runtime", "Compilers and exporters")
    def test_runtime_and_reference_give_the_same(
        self, best: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        onnx = pytest.importorskip("onnx")
        ort = pytest.importorskip("onnxruntime")
        out = best.parent / "model.onnx"
        exported = export(ExportConfig(best, "onnx", out))
        assert exported.runtime == f"ONNX Runtime {ort.__version__}"
        session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
        for n in (1, 2, 5):
            images = torch.randn(n, 3, 24, 24)
            (found,) = session.run(None, {"images": images.numpy()})
            assert relative_error(torch.from_numpy(found), logits(best, images)) < 1e-5
        described = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
        assert described["classes"] == list(data.sample().classes)
        proto = onnx.load(out)
        assert {node.domain for node in proto.graph.node} == {""}
        assert str(Path(torch.__file__).parent).encode() not in out.read_bytes()
        assert_only(best, "model.onnx")

        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        run, _, runtime = exporting._load_onnx(out)
        assert runtime == f"onnx {onnx.__version__}'s reference"
        images = torch.randn(2, 3, 24, 24)
        assert relative_error(run(images), logits(best, images)) < 1e-5

    @pytest.mark.fits_in(
        "torch.onnx.export by standard operators, in ONNX Runtime", "Compilers and exporters"
    )
    @pytest.mark.parametrize("later", [False, True], ids=["fused", "fuse_model"])
    def test_torch_exports_a_fused_model_by_itself(self, later: bool) -> None:
        model = fused_model(later=later)
        assert_standard(model, model, args=IMAGES, dynamic_shapes=DYNAMIC)

    @pytest.mark.fits_in(
        "torch.export, then torch.onnx.export, in ONNX Runtime", "Compilers and exporters"
    )
    def test_torch_exports_a_program_whose_ops_were_decomposed(self) -> None:
        model = fused_model(later=False)
        program = torch.export.export(model, IMAGES, dynamic_shapes=DYNAMIC)
        with pytest.raises(Exception, match=r"No ONNX function found for .*fastres\.conv_bn_relu"):
            torch.onnx.export(program, dynamo=True)
        assert_standard(program.run_decompositions(fastres.ops.decompositions()), model)

    def test_a_residual_add_that_was_fused(self) -> None:
        """As standard operators, those of the model before."""

        class Residual(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

            def forward(self, x: Tensor) -> Tensor:
                return torch.relu(torch.relu(self.bn(self.conv(x)) + x) + x)

        model = fastres.fuse_model(Residual().eval())
        program = torch.onnx.export(model, (torch.randn(2, 3, 8, 8),), dynamo=True)
        assert program is not None
        nodes = program.model_proto.graph.node
        assert [node.op_type for node in nodes] == ["Conv", "Add", "Relu", "Add", "Relu"]

    def test_operators_outside_the_standard_are_refused(self, tmp_path: Path) -> None:
        onnx = pytest.importorskip("onnx")
        helper = onnx.helper
        value = [helper.make_tensor_value_info(name, 1, [1]) for name in ("images", "logits")]
        node = helper.make_node("FusedConv", ["images"], ["logits"], domain="com.microsoft")
        graph = helper.make_graph([node], "g", value[:1], value[1:])
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "m.onnx")
        with pytest.raises(ExportError, match="operators outside the standard"):
            exporting._load_onnx(tmp_path / "m.onnx")

    @pytest.mark.parametrize("package", ["onnx", "onnxscript"])
    def test_missing_package_is_named(
        self, package: str, best: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ExportError, match=rf"needs {package}.*pip install fastres\[onnx\]"):
            export(ExportConfig(best, "onnx", best.parent / "model.onnx"))
        assert_only(best)


class TestRefused:
    """A file that is wrong never takes the place of one that may be right."""

    @pytest.mark.parametrize("form", TORCH_FORMATS)
    def test_other_answers(self, form: str, best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def load_model(path: Path, *, fused: bool) -> Any:
            model, content = train.load_model(path, fused=fused)
            if fused:
                model.fc.weight.data *= 1.001
            return model, content

        monkeypatch.setattr(exporting, "load_model", load_model)
        out = best.parent / "model"
        out.write_text("right")
        with pytest.raises(ExportError, match=r"best\.pt: relative error \d\.\de-0\d with torch"):
            export(ExportConfig(best, form, out, fused=True))
        assert out.read_text() == "right"
        assert_only(best, "model")

    def test_nan(self, best: Path) -> None:
        content = checkpoint.load(best, frozenset())
        content["model"]["fc.bias"][3] = float("nan")
        best.unlink()  # which a second save would keep beside the first
        checkpoint.save(best, content)
        with pytest.raises(ExportError, match="relative error nan"):
            export(ExportConfig(best, "torchscript", best.parent / "model"))
        assert_only(best)

    def test_metadata_lost(self, best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = exporting._FORMATS["pt2"]

        def write(model: Any, example: Any, metadata: str, file: Any) -> None:
            real.write(model, example, "{}", file)

        monkeypatch.setitem(exporting._FORMATS, "pt2", real._replace(write=write))
        with pytest.raises(ExportError, match="lost its metadata"):
            export(ExportConfig(best, "pt2", best.parent / "model"))
        assert_only(best)

    @pytest.mark.parametrize("form", TORCH_FORMATS)
    def test_model_that_torch_cannot_export(
        self, form: str, best: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Odd(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x if float(x.sum()) > id(x) else exec("x")  # type: ignore[return-value]

        def load_model(path: Path, *, fused: bool) -> Any:
            return Odd(), train.load_model(path)[1]

        monkeypatch.setattr(exporting, "load_model", load_model)
        with pytest.raises(ExportError, match=rf"cannot export .*best\.pt as {form}: "):
            export(ExportConfig(best, form, best.parent / "model"))
        assert_only(best)


class TestCommand:
    def test_says_what_it_wrote_and_checked(
        self, best: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = best.parent / "model.pt2"
        arguments = ["export", "--checkpoint", str(best), "--format", "pt2", "--out", str(out)]
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{out}: ")
        assert "float32 images (N, 3, 24, 24) to 10 logits" in said
        assert f"loaded again with torch {torch.__version__}: relative error" in said
        assert "import fastres" not in said

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--format onnx --out m.onnx --fused", "fused is True, expected False with format"),
            ("--format pt2 --out none/m.pt2", "out is 'none/m.pt2', expected a file in a folder"),
            ("--format pt2 --out .", "out is '.', expected a file"),
            ("--format jpeg --out m", "--format"),
            ("--format pt2 --out m", "no checkpoint at none.pt"),
        ],
    )
    def test_errors(
        self,
        arguments: str,
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        try:
            code: Any = main(["export", "--checkpoint", "none.pt", *arguments.split()])
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert not any(tmp_path.iterdir())

    def test_format_from_python(self) -> None:
        with pytest.raises(train.ConfigError, match="format is 'tf', expected torchscript or pt2"):
            ExportConfig(Path("a"), "tf", Path("b"))  # type: ignore[arg-type]

"""A checkpoint's model as a file for other programs: TorchScript, torch.export, ONNX."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, get_args

import torch
import tyro
from torch import Tensor, nn

from fastres.train import ConfigError, load_model
from fastres.train.files import write_atomically
from fastres.version import __version__

FormatName = Literal["torchscript", "pt2", "onnx"]
# Where a file keeps its classes and normalisation: an extra file, or a property in ONNX.
METADATA = "fastres.json"
# Of the logits' relative error. Summing float32 in another order costs 1e-6; a mistake costs more.
TOLERANCE = 1e-4


class ExportError(RuntimeError):
    """A model cannot be exported here, or the file would not answer as the model does."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint's model to a file for other programs.

    The file takes normalised float32 images (N, 3, H, W), with any N, and gives logits
    (N, classes). It also holds the classes, the mean, the standard deviation and what the shorter
    side is resized to before the middle is cut out, as JSON: in TorchScript and torch.export the
    extra file fastres.json, in ONNX the metadata of that name.
    """

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """A best.pt or last.pt of `fastres train`."""

    format: FormatName
    """torchscript (for torch.jit.load), pt2 (for torch.export.load) or onnx."""

    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The file to write, or to replace."""

    fused: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep fastres's fused operations, which is faster; then fastres must be imported before the
    file is loaded, and without this torch is enough. Not for onnx."""

    def __post_init__(self) -> None:
        choices = get_args(FormatName)
        if self.format not in choices:
            raise ConfigError(f"format is {self.format!r}, expected {' or '.join(choices)}")
        if self.fused and self.format == "onnx":
            raise ConfigError(
                "fused is True, expected False with format onnx: its runtimes know standard "
                "operators only, and fuse those themselves"
            )
        if self.out.is_dir() or not self.out.parent.is_dir():
            raise ConfigError(f"out is '{self.out}', expected a file in a folder that exists")


class Exported(NamedTuple):
    """What `export` wrote, and how it was checked."""

    path: Path
    bytes: int
    input_shape: tuple[str | int, ...]
    classes: int
    relative_error: float
    """Of the loaded file's logits against the model's, by their Euclidean norms."""
    runtime: str
    """What loaded the file and ran it."""
    needs_fastres: bool

    def __str__(self) -> str:
        shape = ", ".join(str(size) for size in self.input_shape)
        text = (
            f"{self.path}: {self.bytes / 1e6:,.1f} MB, float32 images ({shape}) to "
            f"{self.classes} logits; loaded again with {self.runtime}: "
            f"relative error {self.relative_error:.1e}"
        )
        if self.needs_fastres:
            text += (
                "\nIt has fastres's operations: import fastres before you load it, or from C++ "
                "load the library fastres.library_path(). Without --fused it needs torch alone."
            )
        return text


Run = Callable[[Tensor], Tensor]


class _Format(NamedTuple):
    """How to write a model with its metadata, and how to load and run what was written."""

    write: Callable[[nn.Module, Tensor, str, BinaryIO], None]
    load: Callable[[Path], tuple[Run, str, str]]  # run, metadata, the runtime's name


def export(config: ExportConfig) -> Exported:
    """Write the model of `config.checkpoint` to `config.out` once the file is known to be right.

    The file is loaded again and must give the logits of the plain model in eager mode, for other
    batch sizes than it was exported with, within a relative error of `TOLERANCE`.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ExportError: a package is missing, the model cannot be exported, or the file's answers are
            not the model's. Nothing is written then, and a file that was there stays.
    """
    form = _FORMATS[config.format]
    # Its graph has standard operators only, so that is what is exported where those are wanted;
    # and a mistake in a fused operation would show beside it.
    plain, content = load_model(config.checkpoint, fused=False)
    model = load_model(config.checkpoint, fused=True)[0] if config.fused else plain
    described = {name: content[name] for name in ("classes", "mean", "std", "resize_size")}
    metadata = json.dumps({"fastres": __version__, "model": content["model_name"], **described})
    size = content["image_size"]
    shape = (3, size, size)
    done: list[Exported] = []

    def write_and_check(file: BinaryIO) -> None:
        with _raising(f"cannot export {config.checkpoint} as {config.format}"):
            form.write(model, torch.zeros(2, *shape), metadata, file)
        file.flush()
        with _raising(f"the {config.format} file that was made cannot be used"):
            run, found, runtime = form.load(Path(file.name))
            error = max(_relative_error(run, plain, n, shape) for n in (1, 3))
        if not error <= TOLERANCE:  # so that NaN does not pass
            raise ExportError(
                f"the {config.format} file that was made does not answer as {config.checkpoint}: "
                f"relative error {error:.1e} with {runtime}, expected at most {TOLERANCE:.0e}"
            )
        if found != metadata:
            raise ExportError(f"the {config.format} file that was made has lost its metadata")
        done.append(
            Exported(
                path=config.out,
                bytes=Path(file.name).stat().st_size,
                input_shape=("N", *shape),
                classes=len(content["classes"]),
                relative_error=error,
                runtime=runtime,
                needs_fastres=config.fused,
            )
        )

    write_atomically(config.out, write_and_check)
    return done[0]


@torch.no_grad()
def _relative_error(run: Run, model: nn.Module, n: int, shape: tuple[int, ...]) -> float:
    """Of run's logits for n images of noise against the model's."""
    images = torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))
    expected, actual = model(images).double(), run(images).double()
    if actual.shape != expected.shape:
        raise ValueError(f"its logits are {tuple(actual.shape)}, not {tuple(expected.shape)}")
    return float((actual - expected).norm() / expected.norm())


@contextmanager
def _raising(what: str) -> Iterator[None]:
    """Make every error an ExportError: torch and the runtimes each have their own."""
    try:
        yield
    except (ExportError, OSError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ExportError(f"{what}: {reason[0] if reason else type(error).__name__}") from error


@contextmanager
def _ignoring(*messages: str) -> Iterator[None]:
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message)
        yield


def _jit_is_deprecated() -> Any:
    return _ignoring(r"`torch\.jit\.\w+` is (deprecated|not supported)")


def _write_torchscript(model: nn.Module, example: Tensor, metadata: str, file: BinaryIO) -> None:
    # Not frozen: that would fix the weights' packing, which is this processor's, and the device.
    with _jit_is_deprecated():
        torch.jit.save(torch.jit.script(model), file, _extra_files={METADATA: metadata})


def _load_torchscript(path: Path) -> tuple[Run, str, str]:
    files = {METADATA: ""}
    with _jit_is_deprecated():
        loaded = torch.jit.load(path, map_location="cpu", _extra_files=files)
    metadata = files[METADATA]
    return loaded, metadata.decode() if isinstance(metadata, bytes) else metadata, _torch()


def _write_pt2(model: nn.Module, example: Tensor, metadata: str, file: BinaryIO) -> None:
    with torch.no_grad():
        program = torch.export.export(
            model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    # channels_last weights are whole all the same.
    with _ignoring("No complete tensor found"):
        torch.export.save(program, file, extra_files={METADATA: metadata})


def _load_pt2(path: Path) -> tuple[Run, str, str]:
    files = {METADATA: ""}
    with path.open("rb") as file:  # a path would have to end in .pt2
        program = torch.export.load(file, extra_files=files)
    return program.module(), files[METADATA], _torch()


def _write_onnx(model: nn.Module, example: Tensor, metadata: str, file: BinaryIO) -> None:
    for package in ("onnx", "onnxscript"):
        _package(package)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own remarks on its deprecations
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None  # it is, with dynamo=True
    proto = program.model_proto
    for node in proto.graph.node:
        for index in reversed(range(len(node.metadata_props))):
            if node.metadata_props[index].key.endswith("stack_trace"):  # paths of this machine
                del node.metadata_props[index]
    proto.metadata_props.add(key=METADATA, value=metadata)
    file.write(proto.SerializeToString())


def _load_onnx(path: Path) -> tuple[Run, str, str]:
    """With ONNX Runtime, or with ONNX's own reference where that is not installed."""
    onnx = _package("onnx")
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    if proto.functions or any(node.domain not in ("", "ai.onnx") for node in proto.graph.node):
        raise ExportError("the ONNX file that was made has operators outside the standard")
    metadata = {entry.key: entry.value for entry in proto.metadata_props}.get(METADATA, "")
    try:
        ort = importlib.import_module("onnxruntime")
    except ModuleNotFoundError:
        session = importlib.import_module("onnx.reference").ReferenceEvaluator(proto)
        runtime = f"onnx {onnx.__version__}'s reference"
    else:
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        runtime = f"ONNX Runtime {ort.__version__}"

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return run, metadata, runtime


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ExportError(
            f"the format onnx needs {error.name}, which is not installed: pip install fastres[onnx]"
        ) from error


def _torch() -> str:
    return f"torch {torch.__version__}"


_FORMATS = {
    "torchscript": _Format(_write_torchscript, _load_torchscript),
    "pt2": _Format(_write_pt2, _load_pt2),
    "onnx": _Format(_write_onnx, _load_onnx),
}

"""The contestants, each in its best settings.

Inference contestants are built from a module in eval mode and its inputs; training contestants
from a model and one batch. A builder returns a `Runner` or raises `NotInstalledError`.
"""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from harness import EAGER, NotInstalledError, Runner
from torch import Tensor, nn
from torch.nn import functional as F

Builder = Callable[[], Runner]
CHANNELS_LAST = torch.channels_last


def load(package: str) -> ModuleType:
    """Import an optional package, or say that it is not installed."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != package.split(".")[0]:
            raise
        raise NotInstalledError(f"{package} is not installed") from error


def single_output(run: Callable[[], Any]) -> Runner:
    """A runner verified by the one tensor that its run returns."""

    def answer() -> dict[str, Tensor]:
        return {"output": torch.as_tensor(run())}

    return Runner(run, answer)


def autocast(device: str, amp: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to `amp`, or what costs nothing."""
    return nullcontext() if amp is None else torch.autocast(device, dtype=amp)


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=CHANNELS_LAST) if x.dim() == 4 else x


# Inference


def eager(module: nn.Module, inputs: Sequence[Tensor], amp: torch.dtype | None = None) -> Runner:
    """The module as it is, channels_last, under inference_mode (and autocast to `amp`)."""
    module = module.to(memory_format=CHANNELS_LAST)
    inputs = [_nhwc(x) for x in inputs]
    device = inputs[0].device.type

    @torch.inference_mode()
    def run() -> Tensor:
        with autocast(device, amp):
            return module(*inputs)

    return single_output(run)


def compiled(
    module: nn.Module,
    inputs: Sequence[Tensor],
    amp: torch.dtype | None = None,
    mode: str | None = None,
    **inductor: Any,
) -> Runner:
    """torch.compile of the module, channels_last; `inductor` are Inductor's own options."""
    module = copy.deepcopy(module).to(memory_format=CHANNELS_LAST)
    inputs = [_nhwc(x) for x in inputs]
    device = inputs[0].device.type
    options = {**(torch._inductor.list_mode_options(mode) if mode else {}), **inductor}
    fast = torch.compile(module, dynamic=False, options=options or None)

    # Freezing works under no_grad only.
    @torch.no_grad()
    def run() -> Tensor:
        with autocast(device, amp):
            return fast(*inputs)

    return single_output(run)


def torchscript(module: nn.Module, inputs: Sequence[Tensor]) -> Runner:
    """Traced, frozen and optimised (oneDNN graph of folded convolutions)."""
    inputs = [_nhwc(x) for x in inputs]
    module = copy.deepcopy(module).to(memory_format=CHANNELS_LAST)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings("ignore", message=".*torch.jit.*is (not supported|deprecated)")
        frozen = torch.jit.freeze(torch.jit.trace(module, tuple(inputs)))
        script = torch.jit.optimize_for_inference(frozen)

    @torch.inference_mode()
    def run() -> Tensor:
        return script(*inputs)

    run(), run()  # The profiling executor specialises on the first two calls.
    return single_output(run)


def export_onnx(module: nn.Module, inputs: Sequence[Tensor], path: Path) -> None:
    """Export with the shapes fixed, which lets the runtimes plan their memory."""
    load("onnxscript")
    contiguous = tuple(x.contiguous() for x in inputs)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            copy.deepcopy(module).to(memory_format=torch.contiguous_format),
            contiguous,
            path,
            dynamo=True,
            input_names=[f"in{index}" for index in range(len(inputs))],
            verbose=False,
            external_data=False,
        )


def onnxruntime(
    onnx_file: Callable[[], Path], inputs: Sequence[Tensor], spinning: bool = True
) -> Runner:
    """ONNX Runtime: every graph optimisation, torch's number of threads, inputs and output bound.

    `spinning`: its threads spin for work as long as a run lasts, which is fastest on a quiet
    machine, and stop when it ends, so that they do not slow whoever comes next.
    """
    ort = load("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(str(onnx_file()), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    # ONNX Runtime's own layout is NCHW; the inputs are given in it.
    arrays = [x.contiguous().numpy() for x in inputs]
    for slot, array in zip(session.get_inputs(), arrays, strict=True):
        binding.bind_cpu_input(slot.name, array)
    result = session.get_outputs()[0]
    output = torch.empty([int(n) for n in result.shape])
    binding.bind_output(result.name, "cpu", 0, "float32", list(output.shape), output.data_ptr())

    def run() -> Tensor:
        session.run_with_iobinding(binding)
        return output

    runner = single_output(run)
    # The binding holds addresses only: keep the arrays alive as long as the run.
    run.arrays = arrays  # type: ignore[attr-defined]
    return runner


def openvino(onnx_file: Callable[[], Path], inputs: Sequence[Tensor], streams: int = 1) -> Runner:
    """OpenVINO in float32 on torch's number of threads.

    One stream: the latency hint. More: the batch is cut into that many parts, which run beside
    each other, each on its share of the threads: OpenVINO's own way to throughput.
    """
    ov = load("openvino")
    threads = torch.get_num_threads()
    properties = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
    }
    core = ov.Core()
    model = core.read_model(str(onnx_file()))
    if streams > 1:
        properties["NUM_STREAMS"] = str(streams)
        model.reshape(
            {
                slot: [x.shape[0] // streams, *x.shape[1:]]
                for slot, x in zip(model.inputs, inputs, strict=True)
            }
        )
    program = core.compile_model(model, "CPU", properties)
    parts = [[p.contiguous() for p in x.chunk(streams)] for x in inputs]
    requests = [program.create_infer_request() for _ in range(streams)]
    for index, request in enumerate(requests):
        for slot, part in enumerate(parts):
            tensor = ov.Tensor(part[index].numpy(), shared_memory=True)
            request.set_input_tensor(slot, tensor)

    def run() -> None:
        if streams == 1:
            requests[0].infer()
            return
        for request in requests:
            request.start_async()
        for request in requests:
            request.wait()

    def answer() -> dict[str, Tensor]:
        run()
        outputs = [torch.from_numpy(r.get_output_tensor(0).data.copy()) for r in requests]
        return {"output": torch.cat(outputs)}

    run.arrays = parts  # type: ignore[attr-defined]
    return Runner(run, answer)


def convert(command: Sequence[str | Path], made: Path) -> Path:
    """Run a rival's converter in the folder of `made`, which it writes, and say nothing of it.

    Raises:
        RuntimeError: it did not write `made`.
    """
    done = subprocess.run(command, cwd=made.parent, capture_output=True, text=True)
    if not made.exists():
        last = [*(done.stdout + done.stderr).strip().splitlines(), ""][-1]
        raise RuntimeError(f"{Path(command[0]).name} wrote no {made.name}: {last}")
    return made


def ncnn(onnx_file: Callable[[], Path], inputs: Sequence[Tensor]) -> Runner:
    """ncnn in float32 on torch's number of threads, its memory pooled, converted by pnnx.

    An ncnn.Mat holds one image, so `inputs` are of batch 1.
    """
    package, pnnx = load("ncnn"), load("pnnx")
    path = onnx_file()
    weights = path.with_suffix(".ncnn.bin")
    if not weights.exists():
        convert([pnnx.EXEC_PATH, path.name, "fp16=0"], weights)
    net = package.Net()
    options = net.opt
    options.num_threads = torch.get_num_threads()
    for name in dir(options):
        if name.startswith(("use_fp16", "use_bf16", "use_int8")):
            setattr(options, name, False)
    pools = package.UnlockedPoolAllocator(), package.PoolAllocator()
    options.blob_allocator, options.workspace_allocator = pools
    net.load_param(str(path.with_suffix(".ncnn.param")))
    net.load_model(str(weights))
    arrays = [x[0].contiguous().numpy() for x in inputs]
    mats = [package.Mat(array) for array in arrays]

    def run() -> Any:
        with net.create_extractor() as extractor:
            for index, mat in enumerate(mats):
                extractor.input(f"in{index}", mat)
            return extractor.extract("out0")[1]

    def answer() -> dict[str, Tensor]:
        output = torch.from_numpy(numpy.array(run()))
        # ncnn gives a vector of classes with or without the batch, by version.
        return {"output": output if output.dim() == 2 else output[None]}

    # ncnn holds addresses only.
    run.kept = pools, arrays  # type: ignore[attr-defined]
    return Runner(run, answer)


def mnn(onnx_file: Callable[[], Path], inputs: Sequence[Tensor]) -> Runner:
    """MNN in float32 ("high") on torch's number of threads."""
    package = load("MNN")
    path = onnx_file()
    program = path.with_suffix(".mnn")
    if not program.exists():
        # The compiled converter alone: MNN.tools pip-installs a logging client and calls home.
        code = "import sys, _tools; _tools.mnnconvert(sys.argv)"
        options = ["-f", "ONNX", "--modelFile", path.name, "--MNNModel", program.name]
        convert([sys.executable, "-c", code, *options], program)
    interpreter = package.Interpreter(str(program))
    # WINOGRAD_MEMORY_LEVEL: at 3, the default, its largest tiles are off by 1e-4 and no faster.
    interpreter.setSessionHint(3, 2)
    session = interpreter.createSession(
        {"backend": "CPU", "precision": "high", "numThread": torch.get_num_threads()}
    )

    def host(array: Any) -> Any:
        layout = package.Tensor_DimensionType_Caffe
        return package.Tensor(array.shape, package.Halide_Type_Float, array, layout)

    arrays = [x.contiguous().numpy() for x in inputs]
    slots = [interpreter.getSessionInput(session, f"in{index}") for index in range(len(arrays))]
    # The session's own input may be overwritten by its later layers, so each run gives it anew.
    given = list(zip(slots, map(host, arrays), strict=True))
    result = interpreter.getSessionOutput(session)
    output = numpy.empty(result.getShape(), numpy.float32)
    target = host(output)

    def run() -> None:
        for slot, source in given:
            slot.copyFrom(source)
        interpreter.runSession(session)
        result.copyToHostTensor(target)

    def answer() -> dict[str, Tensor]:
        run()
        return {"output": torch.from_numpy(target.getNumpyData().copy())}

    run.kept = arrays, output  # type: ignore[attr-defined]
    return Runner(run, answer)


def cpu_inference(
    module: nn.Module, inputs: Sequence[Tensor], scratch: Path | None = None
) -> dict[str, Builder]:
    """All rivals of a module in eval mode on the CPU.

    `scratch` is where the exported model is put; by default a folder that goes with the builders.
    """
    folder = tempfile.TemporaryDirectory() if scratch is None else None
    path = Path(folder.name if folder else scratch or "") / "model.onnx"

    def onnx_file() -> Path:
        _ = folder  # Kept alive by this closure.
        if not path.exists():
            export_onnx(module, inputs, path)
        return path

    entrants: dict[str, Builder] = {
        EAGER: partial(eager, copy.deepcopy(module), inputs),
        "torch.compile": partial(compiled, module, inputs, freezing=True),
        "torch.compile max-autotune": partial(
            compiled, module, inputs, freezing=True, max_autotune=True
        ),
        "TorchScript": partial(torchscript, module, inputs),
        "ONNX Runtime": partial(onnxruntime, onnx_file, inputs),
        "ONNX Runtime, no spinning": partial(onnxruntime, onnx_file, inputs, spinning=False),
        "OpenVINO": partial(openvino, onnx_file, inputs),
    }
    threads = torch.get_num_threads()
    if threads > 1 and inputs[0].shape[0] % threads == 0:
        entrants["OpenVINO streams"] = partial(openvino, onnx_file, inputs, streams=threads)
    if inputs[0].shape[0] == 1:
        entrants["ncnn"] = partial(ncnn, onnx_file, inputs)
        entrants["MNN"] = partial(mnn, onnx_file, inputs)
    return entrants


def graphed(build: Builder) -> Runner:
    """A CUDA graph of a contestant's run: the kernels without the launches."""
    runner = build()
    # The answer of a training step is its first one's, before the warm-up moves the weights.
    first = runner.answer()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            runner.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = runner.run()

    def run() -> Any:
        graph.replay()
        return result

    return Runner(run, (lambda: first) if result is None else single_output(run).answer)


def gpu_inference(module: nn.Module, x: Tensor, amp: torch.dtype) -> dict[str, Builder]:
    """All rivals of a model in eval mode on CUDA, under autocast to `amp`."""
    whole = copy.deepcopy(module).to(amp)
    entrants: dict[str, Builder] = {
        EAGER: partial(eager, module, [x], amp),
        f"{EAGER}, 16-bit weights": partial(eager, whole, [x.to(amp)]),
    }
    entrants[f"{EAGER}, CUDA graph"] = partial(graphed, entrants[f"{EAGER}, 16-bit weights"])
    for label, mode in (
        ("torch.compile", None),
        ("torch.compile reduce-overhead", "reduce-overhead"),
        ("torch.compile max-autotune", "max-autotune"),
    ):
        entrants[label] = partial(compiled, module, [x], amp, mode=mode, freezing=True)
    return entrants


# Training


def training_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    amp: torch.dtype | None = None,
    compile_options: dict[str, Any] | None = None,
) -> Runner:
    """A whole step: forward, cross entropy, backward, SGD with momentum and weight decay.

    The model is channels_last and in training mode; SGD is torch's fused one for everybody. With
    `compile_options` (may be empty) the model goes through torch.compile.
    """
    device = images.device.type
    images = _nhwc(images)
    model = model.to(memory_format=CHANNELS_LAST).train()
    forward: Callable[[Tensor], Tensor] = model
    if compile_options is not None:
        forward = torch.compile(model, dynamic=False, **compile_options)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True
    )

    def loss_of_step() -> Tensor:
        with torch.autocast(device, dtype=amp, enabled=amp is not None):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    def run() -> None:
        loss_of_step()
        optimizer.zero_grad(set_to_none=True)

    def answer() -> dict[str, Tensor]:
        found = collect(model, loss_of_step())
        optimizer.zero_grad(set_to_none=True)
        return found

    return Runner(run, answer, lambda: [*model.parameters(), *model.buffers(), images, labels])


def collect(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """What a training step is verified by: loss, all gradients, all running statistics."""
    # Copies: the next step writes over the gradients and the statistics.
    gradients = [p.grad.detach().flatten().double().cpu() for p in model.parameters()]
    statistics = [
        b.detach().flatten().double().cpu() for b in model.buffers() if b.is_floating_point()
    ]
    found = {"loss": loss.detach().double().cpu(), "gradients": torch.cat(gradients)}
    if statistics:
        found["running statistics"] = torch.cat(statistics)
    return found


def training_reference(
    model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """The same step's loss, gradients and statistics in `dtype`, without an optimizer."""
    exact = copy.deepcopy(model).to(dtype).train()
    loss = F.cross_entropy(exact(images.to(dtype)), labels)
    loss.backward()
    return collect(exact, loss)


def inference_reference(module: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The module's output in float64."""
    with torch.inference_mode():
        return {"output": copy.deepcopy(module).double()(*(x.double() for x in inputs))}


def cpu_training(
    model: nn.Module, images: Tensor, labels: Tensor, amp: torch.dtype | None = None
) -> dict[str, Builder]:
    """Rivals of a training step on the CPU (under autocast to `amp`)."""
    return {
        EAGER: lambda: training_step(copy.deepcopy(model), images, labels, amp),
        "torch.compile": lambda: training_step(copy.deepcopy(model), images, labels, amp, {}),
    }


def gpu_training(
    model: nn.Module, images: Tensor, labels: Tensor, amp: torch.dtype
) -> dict[str, Builder]:
    """Rivals of a training step on CUDA, under autocast to `amp`."""

    def step(options: dict[str, Any] | None) -> Builder:
        return lambda: training_step(copy.deepcopy(model), images, labels, amp, options)

    return {
        EAGER: step(None),
        f"{EAGER}, CUDA graph": lambda: graphed(step(None)),
        "torch.compile": step({}),
        "torch.compile reduce-overhead": step({"mode": "reduce-overhead"}),
        "torch.compile max-autotune": step({"mode": "max-autotune"}),
    }

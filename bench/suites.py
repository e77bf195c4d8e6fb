"""The cases of every suite of compare.py."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import memory
import rivals
import torch
import workloads
from conditioning import well_conditioned
from harness import EAGER, Race, Runner
from PIL import Image
from rivals import Builder, load
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import QUICK, ModelCase, cifar

from cases import RESNET_CONVS, Activation, Conv

FLOOR = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Gradients pass through masks that flip where an activation is close to zero.
GRADIENT_FLOOR = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# Torch eager's own error: what it may be before something is wrong with the case itself.
SANE = {torch.float32: 0.01, torch.bfloat16: 0.3}
# A mask that flips counts for far more than a rounding, and 50 layers of them add up to percents.
GRADIENT_SANE = {torch.float32: 0.1, torch.bfloat16: 0.5}
AMP = torch.bfloat16


@dataclass(frozen=True)
class Options:
    """What the command line asks of all suites."""

    quick: bool = False
    device: str = "cpu"


# Models


def inference_race(suite: str, case: ModelCase, device: str = "cpu") -> Race:
    """A model in eval mode, float32 on the CPU, bfloat16 autocast on CUDA."""
    model = workloads.torchvision_model(case).eval().to(device)
    images, _ = workloads.batch(case, device)
    amp = AMP if device == "cuda" else None
    ours = partial(workloads.fastres_model, case, model)
    entrants: dict[str, Builder] = {"fastres": lambda: rivals.eager(ours(), [images], amp)}
    if device == "cuda":
        whole = partial(_eager_16_bit, ours, images)
        entrants["fastres, 16-bit weights"] = whole
        entrants["fastres, CUDA graph"] = partial(rivals.graphed, whole)
        entrants |= rivals.gpu_inference(model, images, AMP)
    else:
        entrants |= rivals.cpu_inference(model, [images])
    return Race(
        suite,
        str(case),
        entrants,
        partial(rivals.inference_reference, model, [images]),
        FLOOR[amp or torch.float32],
        SANE[amp or torch.float32],
        flops=workloads.model_flops(model, images, training=False),
        images=case.n,
        device=device,
        peak="bfloat16 FLOP/s" if amp else "float32 FLOP/s",
    )


def _eager_16_bit(ours: Callable[[], nn.Module], images: Tensor) -> Runner:
    return rivals.eager(ours().to(AMP), [images.to(AMP)])


def training_race(suite: str, case: ModelCase, device: str = "cpu") -> Race:
    """A whole training step, float32 on the CPU, bfloat16 autocast on CUDA and where asked for."""
    # One ReLU that rounding switches would outweigh all else in the gradients.
    model = well_conditioned(workloads.torchvision_model(case)).train().to(device)
    images, labels = workloads.batch(case, device)
    amp = AMP if device == "cuda" or case.bf16 else None

    def step() -> Runner:
        return rivals.training_step(workloads.fastres_model(case, model), images, labels, amp)

    entrants: dict[str, Builder] = {"fastres": step}
    if device == "cuda":
        entrants["fastres, CUDA graph"] = lambda: rivals.graphed(step)
        entrants |= rivals.gpu_training(model, images, labels, AMP)
    else:
        entrants |= rivals.cpu_training(model, images, labels, amp)
    # In float64 the largest batches would not fit a GPU.
    exact = torch.float32 if device == "cuda" else torch.float64
    return Race(
        suite,
        str(case),
        entrants,
        partial(rivals.training_reference, model, images, labels, exact),
        GRADIENT_FLOOR[amp] if amp else 1e-5,
        GRADIENT_SANE[amp or torch.float32],
        flops=workloads.model_flops(model, images, training=True),
        images=case.n,
        device=device,
        peak="bfloat16 FLOP/s" if amp else "float32 FLOP/s",
    )


def _inference(suite: str, cases: Sequence[ModelCase], device: str) -> Iterator[Callable]:
    for case in cases:
        yield str(case), partial(inference_race, suite, case, device)


def cpu_infer(options: Options) -> Iterator[tuple[str, Callable[[], Race]]]:
    if options.quick:
        return _inference("cpu-infer", [QUICK], "cpu")
    cases = [ModelCase(m, 224, n) for n in (1, 16) for m in ("resnet18", "resnet34", "resnet50")]
    cases += [ModelCase("resnet101", 224, 1), ModelCase("resnet152", 224, 1)]
    cases += [cifar("resnet18", 1), cifar("resnet18", 128)]
    return _inference("cpu-infer", cases, "cpu")


def gpu_infer(options: Options) -> Iterator[tuple[str, Callable[[], Race]]]:
    if options.quick:
        return _inference("gpu-infer", [QUICK], "cuda")
    cases = [ModelCase(m, 224, n) for m in ("resnet18", "resnet50") for n in (1, 32, 256)]
    return _inference("gpu-infer", cases, "cuda")


def _training(suite: str, cases: Sequence[ModelCase], device: str) -> Iterator:
    for case in cases:
        yield str(case), partial(training_race, suite, case, device)


def cpu_train(options: Options) -> Iterator[tuple[str, Callable[[], Race]]]:
    quick = [QUICK]
    full = [cifar("resnet18", 128), ModelCase("resnet50", 224, 8)]
    full += [cifar("resnet18", 128, bf16=True)]
    return _training("cpu-train", quick if options.quick else full, "cpu")


def gpu_train(options: Options) -> Iterator[tuple[str, Callable[[], Race]]]:
    quick = [QUICK]
    full = [ModelCase("resnet50", 224, 256), cifar("resnet18", 512)]
    return _training("gpu-train", quick if options.quick else full, "cuda")


def fuse_race(library: str, size: int, n: int, short: bool) -> Race:
    """Somebody else's ResNet-50 in eval mode, as it is and after `fuse_model`."""
    model = workloads.resnet50_of(library, size, short).eval()
    images, _ = workloads.batch(ModelCase("resnet50", size, n))

    def ours() -> Runner:
        return rivals.eager(load("fastres").fuse_model(model), [images])

    return Race(
        "cpu-fuse",
        f"{library}-resnet50-{size}px-n{n}",
        {"fastres": ours, EAGER: partial(rivals.eager, copy.deepcopy(model), [images])},
        partial(rivals.inference_reference, model, [images]),
        FLOOR[torch.float32],
        SANE[torch.float32],
        flops=workloads.model_flops(model, images, training=False),
        images=n,
        peak="float32 FLOP/s",
    )


def cpu_fuse(options: Options) -> Iterator[tuple[str, Callable[[], Race]]]:
    size, batches = (32, (2,)) if options.quick else (224, (1, 16))
    for n in batches:
        for library in ("torchvision", "timm", "transformers"):
            yield f"{library}-n{n}", partial(fuse_race, library, size, n, options.quick)


def memory_race(case: ModelCase, device: str) -> Race:
    """A training step's memory instead of its time; CUDA graphs keep a pool and stay out."""
    race = training_race("memory", case, device)
    names = ("fastres", EAGER, "torch.compile")
    race.entrants = {name: race.entrants[name] for name in names}
    race.extra["measure"] = "memory"
    return race


def memory_suite(options: Options) -> Iterator[tuple[str, Callable[[], Race]]]:
    if options.quick:
        cases = [QUICK]
    elif options.device == "cuda":
        cases = [ModelCase("resnet50", 224, 256), cifar("resnet18", 512)]
    else:
        cases = [cifar("resnet18", 128), cifar("resnet50", 32), ModelCase("resnet50", 224, 4)]
    for case in cases:
        yield str(case), partial(memory_race, case, options.device)


def measure_memory(runner: Runner, race: Race) -> dict[str, int]:
    """Peak and kept bytes of a step that has run before."""
    return {
        "peak": memory.peak_bytes(runner.run, race.device),
        "kept": memory.kept_bytes(runner.run, runner.tensors()),
    }


# Ops


def find_conv(name: str, n: int) -> Conv:
    """The convolution of tests/cases.py with this name, on a batch of `n`."""
    return next(conv for conv in RESNET_CONVS if conv.name == name).batch(n)


# The stem, every stage's 3x3, and the narrowest and the widest 1x1.
CONVS = (
    find_conv("imagenet-7x7s2-3to64", 16),
    find_conv("imagenet-3x3s1-64to64", 16),
    find_conv("imagenet-3x3s1-128to128", 16),
    find_conv("imagenet-3x3s1-256to256", 16),
    find_conv("imagenet-3x3s1-512to512", 16),
    find_conv("imagenet-3x3s2-128to128", 16),
    find_conv("imagenet-1x1s1-64to256", 16),
    find_conv("imagenet-1x1s1-256to64", 16),
    find_conv("imagenet-1x1s1-512to2048", 16),
    find_conv("imagenet-1x1s1-2048to512", 16),
    find_conv("imagenet-1x1s2-256to512", 16),
    find_conv("imagenet-3x3s1-256to256", 1),
    find_conv("cifar-3x3s1-64to64", 128),
    find_conv("cifar-3x3s1-512to512", 128),
)
QUICK_CONVS = (Conv("quick-3x3s1-16to16", 16, 16, 3, 1, 8, n=2),)

ACTIVATIONS = (
    Activation("n16-64x56", 16, 64, 56),
    Activation("n16-256x56", 16, 256, 56),
    Activation("n128-64x32", 128, 64, 32),
    Activation("n16-2048x7", 16, 2048, 7),
)
GPU_ACTIVATIONS = (
    Activation("n256-256x56", 256, 256, 56),
    Activation("n256-64x112", 256, 64, 112),
    Activation("n512-64x32", 512, 64, 32),
)
STEM_ACTIVATION = Activation("n16-64x112", 16, 64, 112)
QUICK_ACTIVATIONS = (Activation("quick-n2-16x8", 2, 16, 8),)

EPS = 1e-5


def _random(
    *shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(*shape, generator=generator)
    if value.dim() == 4:
        value = value.contiguous(memory_format=torch.channels_last)
    return value.to(device=device, dtype=dtype)


def _double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def _named(outputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    listed = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    # Clones: a compiled function may give its buffers out again.
    return {f"output {i}": t.detach().clone() for i, t in enumerate(listed)}


def op_race(
    name: str,
    theirs: Callable[..., Any],
    ours: Callable[[], Callable[..., Any]],
    inputs: Sequence[Tensor],
    gradients: bool = False,
    **work: Any,
) -> Race:
    """A function of tensors: torch's spelling, eager and compiled, beside fastres's.

    With `gradients` a run is the forward and the backward to all inputs.
    """
    device, dtype = inputs[0].device.type, inputs[0].dtype

    def runner(function: Callable[..., Any], given: Sequence[Tensor]) -> Runner:
        if not gradients:

            @torch.no_grad()
            def forward() -> Any:
                return function(*given)

            return Runner(forward, lambda: _named(forward()))
        leaves = [t.detach().clone().requires_grad_() for t in given]
        cotangent = torch.ones_like(function(*leaves))
        cotangent.copy_(_random(*cotangent.shape, seed=7))

        def both() -> list[Tensor]:
            y = function(*leaves)
            return [y, *torch.autograd.grad(y, leaves, cotangent)]

        return Runner(both, lambda: _named(both()))

    entrants: dict[str, Builder] = {
        "fastres": lambda: runner(ours(), inputs),
        EAGER: lambda: runner(theirs, inputs),
        "torch.compile": lambda: runner(torch.compile(theirs, dynamic=False), inputs),
    }
    floors = GRADIENT_FLOOR if gradients else FLOOR
    return Race(
        "ops",
        name,
        entrants,
        lambda: runner(theirs, _double(inputs)).answer(),
        floors[dtype],
        (GRADIENT_SANE if gradients else SANE)[dtype],
        device=device,
        **work,
    )


def conv_bn_relu_race(conv: Conv, residual: bool, device: str) -> Race:
    """The inference op beside all rivals that run a module."""
    torch.manual_seed(0)
    dtype = AMP if device == "cuda" else torch.float32
    module = workloads.ConvBNReLU(conv).eval().to(device, memory_format=torch.channels_last)
    kind = {"device": device}
    inputs = [_random(conv.n, conv.c_in, conv.size, conv.size, **kind)]
    if residual:
        inputs.append(_random(conv.n, conv.c_out, conv.out, conv.out, seed=1, **kind))
    name = f"conv_bn_{'add_' if residual else ''}relu {conv}"
    work = {"flops": conv.flops, "images": conv.n}
    if device == "cpu":
        entrants: dict[str, Builder] = {"fastres": partial(_fused_op, module, inputs)}
        entrants |= rivals.cpu_inference(module, inputs)
        exact = partial(rivals.inference_reference, module, inputs)
        peak = "float32 FLOP/s"
        return Race("ops", name, entrants, exact, FLOOR[dtype], **work, peak=peak)
    module = module.to(dtype)
    return op_race(
        name,
        module,
        lambda: workloads.fused_conv_bn_relu(module),
        [x.to(dtype) for x in inputs],
        **work,
        peak="bfloat16 FLOP/s",
    )


def _fused_op(module: workloads.ConvBNReLU, inputs: Sequence[Tensor]) -> Runner:
    forward = workloads.fused_conv_bn_relu(module)

    @torch.inference_mode()
    def run() -> Tensor:
        return forward(*inputs)

    return rivals.single_output(run)


def conv_training_race(conv: Conv, device: str) -> Race:
    """conv -> BatchNorm by batch statistics -> ReLU, forward and all gradients."""
    dtype = AMP if device == "cuda" else torch.float32
    kind = {"device": device, "dtype": dtype}
    scale = (conv.c_in * conv.kernel**2) ** -0.5
    inputs = [
        _random(conv.n, conv.c_in, conv.size, conv.size, **kind),
        _random(conv.c_out, conv.c_in, conv.kernel, conv.kernel, seed=1, **kind) * scale,
        _random(conv.c_out, seed=2, device=device) * 0.1 + 1,
        _random(conv.c_out, seed=3, device=device),
    ]

    def theirs(x: Tensor, w: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        z = F.conv2d(x, w, None, conv.stride, conv.padding)
        return F.relu(F.batch_norm(z, None, None, gamma, beta, True, 0.1, EPS))

    def ours() -> Callable[..., Tensor]:
        ops = load("fastres.ops")
        geometry = [[conv.stride] * 2, [conv.padding] * 2, [1, 1], 1]

        def forward(x: Tensor, w: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
            z, mean, var = ops.conv_stats(x, w, None, None, None, None, EPS, *geometry)
            return ops.bn_add_relu(z, mean, var, gamma, beta, EPS)

        return forward

    return op_race(
        f"conv_stats+bn_relu training {conv}",
        theirs,
        ours,
        inputs,
        gradients=True,
        flops=3 * conv.flops,
        images=conv.n,
        peak="bfloat16 FLOP/s" if device == "cuda" else "float32 FLOP/s",
    )


def conv_stats_race(conv: Conv, device: str) -> Race:
    """relu(bn(x)) of the layer before -> conv -> mean and variance, forward only."""
    dtype = AMP if device == "cuda" else torch.float32
    kind = {"device": device, "dtype": dtype}
    scale = (conv.c_in * conv.kernel**2) ** -0.5
    inputs = [
        _random(conv.n, conv.c_in, conv.size, conv.size, **kind),
        _random(conv.c_out, conv.c_in, conv.kernel, conv.kernel, seed=1, **kind) * scale,
        _random(conv.c_in, seed=2, device=device) * 0.1,
        _random(conv.c_in, seed=3, device=device).abs() + 0.5,
        _random(conv.c_in, seed=4, device=device) * 0.1 + 1,
        _random(conv.c_in, seed=5, device=device) * 0.1,
    ]

    def theirs(
        x: Tensor, w: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor
    ) -> tuple[Tensor, ...]:
        a = F.relu(F.batch_norm(x, mean, var, gamma, beta, False, 0.1, EPS))
        z = F.conv2d(a, w, None, conv.stride, conv.padding)
        spread, centre = torch.var_mean(z.float(), (0, 2, 3), correction=0)
        return z, centre, spread

    def exact(*given: Tensor) -> tuple[Tensor, ...]:
        x, w, mean, var, gamma, beta = given
        a = F.relu(F.batch_norm(x, mean, var, gamma, beta, False, 0.1, EPS))
        z = F.conv2d(a, w, None, conv.stride, conv.padding)
        return z, z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)

    def ours() -> Callable[..., Any]:
        ops = load("fastres.ops")
        geometry = [[conv.stride] * 2, [conv.padding] * 2, [1, 1], 1]
        return lambda *t: ops.conv_stats(*t, EPS, *geometry)

    race = op_race(
        f"conv_stats forward {conv}",
        theirs,
        ours,
        inputs,
        flops=conv.flops,
        images=conv.n,
        peak="bfloat16 FLOP/s" if device == "cuda" else "float32 FLOP/s",
    )
    race.reference = lambda: _named(exact(*_double(inputs)))
    # The mean of many values of both signs is small against each of them.
    race.floor = max(race.floor, 1e-5)
    return race


def activation_races(a: Activation, device: str) -> Iterator[tuple[str, Callable[[], Race]]]:
    """The element-wise ops, bound by memory: rates are of the fewest bytes."""
    dtype = AMP if device == "cuda" else torch.float32
    kind = {"device": device, "dtype": dtype}
    nbytes = a.n * a.c * a.size**2 * dtype.itemsize

    def activation(seed: int) -> Tensor:
        return _random(*a.shape, seed=seed, **kind)

    def vectors() -> list[Tensor]:
        return [
            _random(a.c, seed=3, device=device) * 0.1,
            _random(a.c, seed=4, device=device).abs() + 0.5,
            _random(a.c, seed=5, device=device) * 0.1 + 1,
            _random(a.c, seed=6, device=device) * 0.1,
        ]

    def race(name: str, *arguments: Any, moved: int) -> tuple[str, Callable[[], Race]]:
        def build() -> Race:
            theirs, ours, inputs = arguments
            return op_race(
                name, theirs, ours, inputs(), bytes=moved * nbytes, images=a.n, peak="copy B/s"
            )

        return name, build

    yield race(
        f"add_relu {a}",
        lambda x, r: F.relu(x + r),
        lambda: load("fastres.ops").add_relu,
        lambda: [activation(0), activation(1)],
        moved=3,
    )
    yield race(
        f"add_relu backward {a}",
        lambda dy, y: torch.ops.aten.threshold_backward(dy, y, 0),
        lambda: load("fastres.ops") and torch.ops.fastres.add_relu_backward,
        lambda: [activation(0), F.relu(activation(1))],
        moved=3,
    )

    def bn_add_relu(z, mean, var, gamma, beta, r) -> Tensor:
        return F.relu(F.batch_norm(z, mean, var, gamma, beta, False, 0.1, EPS) + r)

    yield race(
        f"bn_add_relu {a}",
        bn_add_relu,
        lambda: _ours_bn_add_relu,
        lambda: [activation(0), *vectors(), activation(1)],
        moved=3,
    )

    def bn_relu(z, mean, var, gamma, beta) -> Tensor:
        return F.relu(F.batch_norm(z, mean, var, gamma, beta, False, 0.1, EPS))

    yield race(
        f"bn_relu {a}",
        bn_relu,
        lambda: _ours_bn_add_relu,
        lambda: [activation(0), *vectors()],
        moved=2,
    )
    # One reduction pass reads dy, y and z; the apply pass writes dz and the residual's gradient.
    yield race(
        f"bn_add_relu backward {a}",
        _torch_bn_add_relu_backward,
        lambda: _ours_bn_add_relu_backward,
        lambda: [
            activation(0),
            F.relu(activation(1)),
            activation(2),
            *vectors()[:3],
            activation(7),
        ],
        moved=5,
    )


def max_pool_race(a: Activation) -> tuple[str, Callable[[], Race]]:
    """The stem's max-pool of `a`; bytes are those of its input and output."""

    def build() -> Race:
        return op_race(
            name,
            lambda x: F.max_pool2d(x, 3, 2, 1),
            lambda: lambda x: load("fastres.ops").max_pool2d(x, [3, 3], [2, 2], [1, 1]),
            [_random(*a.shape, seed=0, device="cpu")],
            bytes=a.n * a.c * (a.size**2 + ((a.size + 1) // 2) ** 2) * 4,
            images=a.n,
            peak="copy B/s",
        )

    name = f"max_pool2d {a}"
    return name, build


def _ours_bn_add_relu(
    z: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, r: Tensor | None = None
) -> Tensor:
    return load("fastres.ops").bn_add_relu(z, mean, var, gamma, beta, EPS, r)


def _torch_bn_add_relu_backward(
    dy: Tensor, y: Tensor, z: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, r: Tensor
) -> tuple[Tensor, ...]:
    """The gradients for statistics that are given, as fastres's op has them."""
    g = torch.ops.aten.threshold_backward(dy, y, 0)
    dz, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        g, z, gamma, mean, var, mean, torch.rsqrt(var + EPS), False, EPS, [True, True, True]
    )
    return dz, dgamma, dbeta, g


def _ours_bn_add_relu_backward(
    dy: Tensor, y: Tensor, z: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, r: Tensor
) -> tuple[Tensor, ...]:
    found = torch.ops.fastres.bn_add_relu_backward(
        dy, y, z, mean, var, gamma, EPS, r, None, None, None, EPS, True
    )
    return found[0], found[3], found[4], found[5]


def ops(options: Options) -> Iterator[tuple[str, Callable[[], Race]]]:
    device = options.device
    convs, activations = CONVS, GPU_ACTIVATIONS if device == "cuda" else ACTIVATIONS
    if options.quick:
        convs, activations = QUICK_CONVS, QUICK_ACTIVATIONS
    elif device == "cuda":
        convs = tuple(conv.batch(256) for conv in CONVS if conv.n == 16)
    for conv in convs:
        for residual in (False, True):
            if residual and conv.kernel == 7:
                continue
            name = f"conv_bn_{'add_' if residual else ''}relu {conv}"
            yield name, partial(conv_bn_relu_race, conv, residual, device)
    for conv in convs:
        yield f"conv_stats forward {conv}", partial(conv_stats_race, conv, device)
        yield f"conv_stats+bn_relu training {conv}", partial(conv_training_race, conv, device)
    for activation in activations:
        yield from activation_races(activation, device)
    if device == "cpu":  # on CUDA the models use torch's
        yield max_pool_race(QUICK_ACTIVATIONS[0] if options.quick else STEM_ACTIVATION)


# Data

LOADER = "DataLoader, 2 workers"


def _epoch(n: int, loader: Callable[[bool], Any]) -> Runner:
    """Takes the `n` images of `loader(True)`; answers with the first batch of `loader(False)`."""
    augmented = loader(True)

    def run() -> None:
        seen = 0
        for images, _ in augmented:
            seen += len(images)
        if seen != n:
            raise RuntimeError(f"{seen} images instead of {n}")

    def answer() -> dict[str, Tensor]:
        images, numbers = next(iter(loader(False)))
        return {"images": images, "labels": numbers}

    return Runner(run, answer)


def data_race(n: int, batch_size: int) -> Race:
    """An epoch of augmented batches in memory; verified by the first without augmentation."""
    pictures, labels = workloads.images_uint8(n)
    runner = partial(_epoch, n)

    def torchvision(workers: int, v2: bool) -> Builder:
        return lambda: runner(
            lambda augment: workloads.torchvision_loader(
                pictures, labels, batch_size, augment, workers if augment else 0, v2
            )
        )

    def exact() -> dict[str, Tensor]:
        first = pictures[:batch_size].permute(0, 3, 1, 2).double() / 255
        mean, std = (
            torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1)
            for v in (workloads.MEAN, workloads.STD)
        )
        return {"images": (first - mean) / std, "labels": labels[:batch_size]}

    entrants: dict[str, Builder] = {
        "fastres": lambda: runner(
            lambda augment: workloads.fastres_batches(pictures, labels, batch_size, augment)
        ),
        LOADER: torchvision(2, v2=False),
        "DataLoader, transforms.v2": torchvision(2, v2=True),
        "DataLoader, no workers": torchvision(0, v2=False),
    }
    name = f"cifar-{n}-images-batch{batch_size}"
    return Race("data", name, entrants, exact, 1e-6, images=n, yardstick=LOADER)


def folder_race(n: int, batch_size: int) -> Race:
    """An epoch of augmented batches of JPEG files; verified as in `data_race`."""
    held = tempfile.TemporaryDirectory()  # goes with the builders, which hold it
    folder = Path(held.name)
    workloads.write_jpegs(folder, n)
    runner = partial(_epoch, n)

    def torchvision(workers: int, v2: bool) -> Builder:
        return lambda: runner(
            lambda augment: workloads.image_folder_loader(
                Path(held.name), batch_size, augment, workers if augment else 0, v2
            )
        )

    def exact() -> dict[str, Tensor]:
        from torchvision.transforms import v2

        whole = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
        paths = sorted(folder.glob("*/*.jpg"))[:batch_size]
        pixels = torch.stack([whole(Image.open(path)) for path in paths]).double() / 255
        mean, std = (
            torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1)
            for v in (workloads.IMAGENET_MEAN, workloads.IMAGENET_STD)
        )
        numbers = torch.tensor([int(path.parent.name.removeprefix("class-")) for path in paths])
        return {"images": (pixels - mean) / std, "labels": numbers}

    entrants: dict[str, Builder] = {
        "fastres": lambda: runner(
            lambda augment: workloads.fastres_pictures(
                folder, batch_size, augment, 2 if augment else 0
            )
        ),
        LOADER: torchvision(2, v2=False),
        "DataLoader, transforms.v2": torchvision(2, v2=True),
        "DataLoader, no workers": torchvision(0, v2=False),
    }
    name = f"folder-{n}-jpegs-224px-batch{batch_size}"
    return Race("data", name, entrants, exact, 1e-6, images=n, yardstick=LOADER)


def data(options: Options) -> Iterator[tuple[str, Callable[[], Race]]]:
    n = 256 if options.quick else 10_000
    yield f"cifar-{n}-images-batch128", partial(data_race, n, 128)
    n = 16 if options.quick else 512
    yield f"folder-{n}-jpegs-224px-batch32", partial(folder_race, n, 32)


SUITES: dict[str, Callable[[Options], Iterator[tuple[str, Callable[[], Race]]]]] = {
    "cpu-infer": cpu_infer,
    "cpu-train": cpu_train,
    "cpu-fuse": cpu_fuse,
    "gpu-infer": gpu_infer,
    "gpu-train": gpu_train,
    "memory": memory_suite,
    "ops": ops,
    "data": data,
}

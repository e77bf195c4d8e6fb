"""A fused model in the place of a plain one, under everything that is done with models.

Each test is a row of docs/matrix.md, for every way in which a model comes to be fused: output,
gradients and buffers are the plain model's, judged against float64. Compilers and exporters have
their rows in files of their own.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from recording import convolutions_of
from running import in_two
from tiny_resnets import CLASSES, FUSED, images, plain_resnet
from tolerances import FACTOR

Results = dict[str, Tensor]
Fuse = Callable[[nn.Module], nn.Module]
Change = Callable[[Any], object]

CONVOLUTIONS = 6  # of tiny_resnets' models
LABELS = torch.arange(6) % CLASSES
# What rounding in several layers may add to an error, relative to the result.
SLACK = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

modes = pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """So little work is only slowed down by a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=FUSED)
def way(request: pytest.FixtureRequest) -> str:
    """How a model comes to be fused."""
    return request.param


@pytest.fixture
def fuse(way: str) -> Fuse:
    return FUSED[way]


def step(model: nn.Module, x: Tensor) -> Results:
    """Output, gradients and buffers of one forward and backward."""
    y = model(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y.to(torch.promote_types(y.dtype, torch.float32)) * cotangent).sum().backward()
    return {"output": y.detach()} | state_of(model)


def state_of(model: nn.Module) -> Results:
    """Gradients, and buffers of floating point."""
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    found |= {key: b for key, b in model.named_buffers() if b.is_floating_point()}
    return {key: value.clone() for key, value in found.items()}


def assert_same(
    fuse: Fuse,
    run: Callable[[Any, Tensor], Results] = step,
    change: Change = lambda model: None,
    *,
    plain: nn.Module | None = None,
    train: bool = True,
    dtype: torch.dtype = torch.float32,
    computed_in: torch.dtype | None = None,
    fused_convolutions: int = CONVOLUTIONS,
) -> tuple[Results, nn.Module]:
    """``run`` finds the same in a fused model as in the plain one.

    Args:
        change: made to each model before it runs.
        dtype: of the models and the images.
        computed_in: whose rounding to expect; None is ``dtype``'s.
        fused_convolutions: how many of the model's convolutions fused ops compute.

    Returns:
        What it found in the fused model, and that model.
    """
    plain = (plain_resnet() if plain is None else plain).to(dtype).train(train)
    models = [fuse(plain), copy.deepcopy(plain).double(), plain]
    for model in models:
        change(model)
    x = images().to(dtype)
    exact, theirs = run(models[1], x.double()), run(plain, x)
    ours = run(models[0], x)
    assert ours.keys() == exact.keys()
    # Some gradients cancel but for rounding: beside all of them it is small.
    gradients = exact.keys() & {key for key, _ in models[1].named_parameters()}
    size_of_all = sum(exact[key].square().sum() for key in gradients) ** 0.5
    for key, value in exact.items():
        assert ours[key].dtype == theirs[key].dtype, key
        slack = SLACK[computed_in or dtype] * (size_of_all if key in gradients else value.norm())
        error, their_error = ((found[key].double() - value).norm() for found in (ours, theirs))
        assert error <= FACTOR * their_error + slack, f"{key}: {error}, torch's own {their_error}"
    assert convolutions_of(models[0], x) == fused_convolutions
    return ours, models[0]


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


# ---- precision


def under_autocast(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Results:
    with torch.autocast("cpu", dtype, enabled=x.dtype == torch.float32):
        return step(model, x)


@modes
@pytest.mark.fits_in("autocast to bfloat16", "Precision")
def test_autocast(fuse: Fuse, train: bool) -> None:
    run = partial(under_autocast, dtype=torch.bfloat16)
    ours, _ = assert_same(fuse, run, train=train, computed_in=torch.bfloat16)
    assert ours.pop("output").dtype == torch.bfloat16
    assert {value.dtype for value in ours.values()} == {torch.float32}


def scaled_steps(model: nn.Module, x: Tensor) -> Results:
    """Two steps with a gradient scaler; the gradients of the first overflow in float16."""
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-24)
    half = x.dtype == torch.float32
    for scale in (2.0**30, 2.0**6):
        assert scaler.get_scale() == scale
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = F.cross_entropy(model(x), LABELS)
        if not half and scale == 2.0**30:  # what float64 does not have to skip
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
            continue
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    steps = {key: p.detach() - before[key] for key, p in model.named_parameters()}
    return steps | {key: b.clone() for key, b in model.named_buffers() if b.is_floating_point()}


@pytest.mark.fits_in(
    "autocast to float16 with GradScaler, one step of which overflows", "Precision"
)
def test_grad_scaler(fuse: Fuse) -> None:
    ours, _ = assert_same(fuse, scaled_steps, computed_in=torch.float16)
    assert ours["conv1.weight"].abs().max() > 0


@modes
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float16, marks=pytest.mark.fits_in("model.half()", "Precision")),
        pytest.param(torch.bfloat16, marks=pytest.mark.fits_in("model.bfloat16()", "Precision")),
        pytest.param(torch.float64, marks=pytest.mark.fits_in("model.double()", "Precision")),
    ],
    ids=str,
)
def test_dtype(fuse: Fuse, dtype: torch.dtype, train: bool) -> None:
    assert_same(fuse, train=train, dtype=dtype)


# ---- training


def in_parts(model: nn.Module, x: Tensor) -> Results:
    for part in x.chunk(2):
        found = step(model, part)
    return found


@pytest.mark.fits_in("gradient accumulation", "Training")
def test_gradient_accumulation(fuse: Fuse) -> None:
    assert_same(fuse, in_parts)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner = inner
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


def checkpoint_stages(model: Any, use_reentrant: bool) -> None:
    model.layer1 = Checkpointed(model.layer1, use_reentrant)
    model.layer2 = Checkpointed(model.layer2, use_reentrant)


@pytest.mark.fits_in("torch.utils.checkpoint, use_reentrant True and False", "Training")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(fuse: Fuse, use_reentrant: bool) -> None:
    assert_same(fuse, change=partial(checkpoint_stages, use_reentrant=use_reentrant))


PARTS: dict[str, Callable[[Any], list[nn.Module]]] = {
    "the stem and the first stage": lambda m: [m.conv1, m.bn1, m.layer1],
    "the convolutions": lambda m: [c for c in m.modules() if isinstance(c, nn.Conv2d)],
    "the BatchNorms": batch_norms,
    "all but the classifier": lambda m: [m.conv1, m.bn1, m.layer1, m.layer2],
}


@modes
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.fits_in("requires_grad_(False) on parts", "Training")
def test_frozen_parts(fuse: Fuse, part: str, train: bool) -> None:
    def freeze(model: nn.Module) -> None:
        for module in PARTS[part](model):
            module.requires_grad_(False)

    _, model = assert_same(fuse, change=freeze, train=train)
    assert {p.grad is None for m in PARTS[part](model) for p in m.parameters()} == {True}


@pytest.mark.parametrize("which", [slice(None), slice(1, 3)], ids=["all", "one block's"])
@pytest.mark.fits_in("eval() on BatchNorm alone: frozen statistics in training", "Training")
def test_frozen_statistics(fuse: Fuse, which: slice) -> None:
    def freeze(model: nn.Module) -> None:
        for bn in batch_norms(model)[which]:
            bn.eval()

    assert_same(fuse, change=freeze)


def image_gradient(model: nn.Module, x: Tensor) -> Results:
    x = x.clone().requires_grad_()
    return step(model, x) | {"images": x.grad}


@modes
@pytest.mark.fits_in("an input that needs a gradient, with parameters or alone", "Training")
def test_input_gradient(fuse: Fuse, train: bool) -> None:
    assert_same(fuse, image_gradient, train=train)
    ours, _ = assert_same(fuse, image_gradient, lambda m: m.requires_grad_(False), train=train)
    assert "fc.weight" not in ours and "images" in ours


# ---- layers' options


def two_steps(model: nn.Module, x: Tensor) -> Results:
    """So that averages of averages show; then in eval mode."""
    step(model, 3 * x)
    found = step(model, x)
    with torch.no_grad():
        return found | {"in eval mode": model.eval()(x)}


@pytest.mark.parametrize(
    "option",
    [
        pytest.param({"momentum": None}, marks=pytest.mark.fits_in("momentum=None", "BatchNorm")),
        pytest.param({"affine": False}, marks=pytest.mark.fits_in("affine=False", "BatchNorm")),
        pytest.param(
            {"track_running_stats": False},
            marks=pytest.mark.fits_in("track_running_stats=False", "BatchNorm"),
        ),
    ],
    ids=str,
)
def test_batch_norm_options(fuse: Fuse, option: dict[str, Any]) -> None:
    plain = plain_resnet(partial(nn.BatchNorm2d, **option))
    assert_same(fuse, two_steps, plain=plain)


def give_biases(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            bias = torch.linspace(-1, 1, module.out_channels, dtype=module.weight.dtype)
            module.bias = nn.Parameter(bias)


@pytest.mark.fits_in("convolutions with a bias", "BatchNorm")
def test_convolution_bias(fuse: Fuse) -> None:
    assert_same(fuse, change=give_biases, train=False)
    assert_same(fuse, change=give_biases, fused_convolutions=0)


# ---- tools


def called_with_other_parameters(model: nn.Module, x: Tensor) -> Results:
    values = {key: (1.1 * p.detach()).requires_grad_() for key, p in model.named_parameters()}
    y = functional_call(model, values, (x,))
    found = dict(
        zip(values, torch.autograd.grad(y.square().sum(), [*values.values()]), strict=True)
    )
    assert all(p.grad is None for p in model.parameters())
    return {"output": y.detach()} | found | state_of(model)


@modes
@pytest.mark.fits_in("torch.func.functional_call", "Tools")
def test_functional_call(fuse: Fuse, train: bool) -> None:
    assert_same(fuse, called_with_other_parameters, train=train)


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save and load": through_file,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.fits_in("copy.deepcopy, pickle, torch.save", "Tools")
def test_copies(fuse: Fuse, how: str) -> None:
    def trained_copy(model: nn.Module, x: Tensor) -> Results:
        with torch.no_grad():
            model.eval()(x)  # what is kept for inference stays out of the copy
        other = COPIES[how](model.train())
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        found = step(other, x)
        assert not any(p.grad is not None for p in model.parameters())
        return found

    assert_same(fuse, trained_copy)


def through_state_hooks(model: Any, x: Tensor) -> Results:
    """Hooks of a state_dict and of its loading, on the model and on layers."""
    seen: list[str] = []

    def rename(module: nn.Module, state: Results, prefix: str, metadata: Any) -> None:
        seen.append("state_dict")
        state[prefix + "kernel"] = 2 * state.pop(prefix + "weight")

    def name_back(module: nn.Module, state: Results, prefix: str, *args: Any) -> None:
        seen.append("load_state_dict")
        state[prefix + "weight"] = state.pop(prefix + "kernel")

    conv, bn = model.layer2[0].conv1, model.layer1[0].bn2
    for layer in (conv, bn):
        layer.register_state_dict_post_hook(rename)
        layer.register_load_state_dict_pre_hook(name_back)
    model.register_state_dict_pre_hook(lambda *args: seen.append("before"))
    model.register_load_state_dict_post_hook(lambda *args: seen.append("after"))
    with torch.no_grad():
        model.eval()(x)
        state = model.state_dict()
        model.load_state_dict(state)
        y = model(x)
    assert seen == ["before", *["state_dict"] * 2, *["load_state_dict"] * 2, "after"]
    found = {key: value for key, value in state.items() if value.is_floating_point()}
    return found | {"output": y}


@pytest.mark.fits_in("hooks of state_dict and load_state_dict", "Tools")
def test_state_dict_hooks(fuse: Fuse) -> None:
    assert_same(fuse, through_state_hooks)


def hooked_step(model: Any, x: Tensor) -> Results:
    """A step in which hooks look at layers and change what they return."""
    seen: Results = {}
    block = model.layer1[0]
    handles = [
        block.conv1.register_forward_hook(lambda m, args, y: 1.5 * y),
        block.bn2.register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
        block.conv2.register_full_backward_hook(lambda m, gx, gy: seen.update(conv2=gy[0].clone())),
        block.register_forward_hook(lambda m, args, y: seen.update(block=y.detach().clone())),
    ]
    found = step(model, x)
    for handle in handles:
        handle.remove()
    return found | seen


@modes
@pytest.mark.fits_in("forward and backward hooks of layers", "Tools")
def test_hooks(fuse: Fuse, train: bool) -> None:
    ours, _ = assert_same(fuse, hooked_step, train=train)
    assert {"conv2", "block"} <= ours.keys()


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def parametrize_layers(model: Any) -> None:
    parametrizations.weight_norm(model.layer1[0].conv1)
    parametrize.register_parametrization(model.layer2[0].bn1, "weight", Doubled())


@modes
@pytest.mark.fits_in("parametrizations, and removing them", "Tools")
def test_parametrizations(fuse: Fuse, train: bool) -> None:
    def remove(model: Any) -> None:
        parametrize_layers(model)
        parametrize.remove_parametrizations(model.layer1[0].conv1, "weight")
        parametrize.remove_parametrizations(model.layer2[0].bn1, "weight")

    assert_same(fuse, change=parametrize_layers, train=train, fused_convolutions=CONVOLUTIONS - 2)
    assert_same(fuse, change=remove, train=train)


def prune_layers(model: Any) -> None:
    prune.l1_unstructured(model.layer1[0].conv2, "weight", 0.5)
    prune.ln_structured(model.layer2[0].conv1, "weight", 0.5, n=2, dim=0)


@modes
@pytest.mark.fits_in("pruning, and making it permanent", "Tools")
def test_pruning(fuse: Fuse, train: bool) -> None:
    def make_permanent(model: Any) -> None:
        prune_layers(model)
        prune.remove(model.layer1[0].conv2, "weight")
        prune.remove(model.layer2[0].conv1, "weight")

    assert_same(fuse, change=prune_layers, train=train, fused_convolutions=CONVOLUTIONS - 2)
    assert_same(fuse, change=make_permanent, train=train)


# ---- derivatives


def gradient_penalty(model: nn.Module, x: Tensor) -> Results:
    """The gradient of a loss that holds a gradient."""
    x = x.clone().requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (F.cross_entropy(y, LABELS) + dx.square().mean()).backward()
    return {"dx": dx.detach(), "output": y.detach(), "x": x.grad} | state_of(model)


@modes
@pytest.mark.fits_in("double backward", "Derivatives")
def test_double_backward(fuse: Fuse, train: bool) -> None:
    assert_same(fuse, gradient_penalty, train=train)


def loss_of(model: nn.Module, parameters: Results, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(functional_call(model, parameters, (x,)), y)


def detached(model: nn.Module) -> Results:
    return {key: p.detach() for key, p in model.named_parameters()}


def grad_of_parameters(model: nn.Module, x: Tensor) -> Results:
    return grad(partial(loss_of, model))(detached(model), x, LABELS)


@modes
@pytest.mark.fits_in("torch.func.grad", "Derivatives")
def test_func_grad(fuse: Fuse, train: bool) -> None:
    """In training without running statistics, which torch.func's functions may not change."""
    change: Change = torch.func.replace_all_batch_norm_modules_ if train else lambda model: None
    assert_same(fuse, grad_of_parameters, change, train=train)


def grad_of_each_image(model: nn.Module, x: Tensor) -> Results:
    def of_one(parameters: Results, x: Tensor, y: Tensor) -> Tensor:
        return loss_of(model, parameters, x[None], y[None])

    return vmap(grad(of_one), in_dims=(None, 0, 0))(detached(model), x, LABELS)


@pytest.mark.fits_in(
    "torch.func.vmap over torch.func.grad: a gradient for each image", "Derivatives"
)
def test_func_vmap(fuse: Fuse) -> None:
    assert_same(fuse, grad_of_each_image, train=False)


def ensemble(model: nn.Module, x: Tensor) -> Results:
    models = [model, copy.deepcopy(model)]
    with torch.no_grad():
        models[1].conv1.weight.mul_(2)
    parameters, buffers = torch.func.stack_module_state(models)
    call = partial(functional_call, model)
    return {"outputs": vmap(call, in_dims=(0, None))((parameters, buffers), (x,)).detach()}


@pytest.mark.fits_in("torch.func.vmap over models", "Derivatives")
def test_func_vmap_over_models(fuse: Fuse) -> None:
    assert_same(fuse, ensemble, train=False)


def directional(model: nn.Module, x: Tensor) -> Results:
    """A derivative in forward mode, of torch.func and of torch.autograd, and one of a gradient."""
    direction = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    y, dy = jvp(model, (x,), (direction,))
    with torch.autograd.forward_ad.dual_level():
        dual = model(torch.autograd.forward_ad.make_dual(x, direction))
        same = torch.autograd.forward_ad.unpack_dual(dual).tangent
    _, second = jvp(grad(lambda x: model(x).square().sum()), (x,), (direction,))
    return {"y": y.detach(), "dy": dy.detach(), "same": same.detach(), "second": second.detach()}


@pytest.mark.parametrize("frozen", [False, True], ids=["with parameters", "of the input alone"])
@pytest.mark.fits_in("forward-mode derivatives and Hessian-vector products", "Derivatives")
def test_forward_mode(fuse: Fuse, frozen: bool) -> None:
    assert_same(fuse, directional, lambda m: m.requires_grad_(not frozen), train=False)


# ---- several processes


@pytest.fixture(scope="module")
def together() -> list[str]:
    """The lines of two processes that ran two_processes.py, and their errors."""
    return [
        line
        for _, *said in in_two(Path(__file__).with_name("two_processes.py"))
        for line in "".join(said).splitlines()
    ]


def assert_passed(check: str, way: str, together: list[str]) -> None:
    assert together.count(f"{check} {way}") == 2, "\n".join(together)


@pytest.mark.fits_in("DistributedDataParallel", "Several processes")
def test_data_parallel(way: str, together: list[str]) -> None:
    assert_passed("data_parallel", way, together)


@pytest.mark.fits_in(
    "shares of a batch that differ in size, as in fastres train", "Several processes"
)
def test_uneven_shares(way: str, together: list[str]) -> None:
    assert_passed("uneven_shares", way, together)


@pytest.mark.fits_in("FSDP2 (fully_shard)", "Several processes")
def test_fully_sharded(way: str, together: list[str]) -> None:
    assert_passed("fully_sharded", way, together)
    assert_passed("fully_sharded_in_eval_mode", way, together)


@pytest.mark.fits_in("SyncBatchNorm.convert_sync_batchnorm after fusing", "Several processes")
def test_synchronised_after_fusing(way: str, together: list[str]) -> None:
    assert_passed("synchronised_after_fusing", way, together)


@pytest.mark.fits_in("SyncBatchNorm.convert_sync_batchnorm before fusing", "Several processes")
def test_synchronised_before_fusing(way: str, together: list[str]) -> None:
    assert_passed("synchronised_before_fusing", way, together)

"""Blocks' outputs that the backward computes again: less is kept, and not a bit of a gradient
changes."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fastres import models
from fastres.models.resnet import FusedBasicBlock, FusedBottleneck, FusedResNet

# Of resnet18 with the CIFAR stem: the stem's output, then those of the blocks, in order.
RECOMPUTED = [True, True, False, True, True, True, True, False, False]


def resnet(name: str = "resnet18", **kwargs) -> FusedResNet:
    torch.manual_seed(0)
    kwargs = {"stem": "cifar", "num_classes": 10, **kwargs}
    model = getattr(models, name)(fused=True, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.train()


def images(n: int = 4, size: int = 16) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def keeping(model: nn.Module) -> nn.Module:
    """A copy of the model that computes nothing again."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = 0
    return model


def loss_of(y: Tensor) -> Tensor:
    return (y.float() * torch.linspace(-1, 1, y.shape[-1])).square().sum()


def gradients(
    model: nn.Module, x: Tensor, forward: Callable[[nn.Module, Tensor], Tensor] | None = None
) -> dict[str, Tensor | None]:
    """The loss, x's gradient, all parameters' and the buffers after one step."""
    x = x.clone().requires_grad_()
    loss = loss_of(model(x) if forward is None else forward(model, x))
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    found |= {name: b.clone() for name, b in model.named_buffers()}
    return {**found, "loss": loss.detach(), "x": x.grad}


def assert_same_bits(
    actual: dict[str, Tensor | None],
    expected: dict[str, Tensor | None],
    equal_nan: bool = False,
) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if value is None:
            assert actual[key] is None, key
        else:
            say = partial("{}: {}".format, key)
            torch.testing.assert_close(
                actual[key], value, rtol=0, atol=0, equal_nan=equal_nan, msg=say
            )


class Passes(TorchDispatchMode):
    """Counts the calls of bn_add_relu, and holds weak references to what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name == "fastres::bn_add_relu":
            self.results.append(weakref.ref(result))
        return result

    @property
    def alive(self) -> list[bool]:
        return [ref() is not None for ref in self.results]


def assert_same_step(
    model: nn.Module,
    x: Tensor,
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
    equal_nan: bool = False,
) -> Passes:
    """All results of a step are those of the model that keeps every output; its passes."""
    expected = gradients(keeping(model), x, forward)
    with Passes() as passes:
        actual = gradients(model, x, forward)
    assert_same_bits(actual, expected, equal_nan=equal_nan)
    return passes


# ---- the same answers


@pytest.mark.parametrize(
    ("name", "stem", "shortcut"),
    [
        ("resnet18", "cifar", "projection"),
        ("resnet18", "imagenet", "zero_pad"),
        ("resnet34", "cifar", "zero_pad"),
        ("resnet50", "cifar", "projection"),
        ("resnet50", "imagenet", "projection"),
    ],
)
def test_same_bits_in_every_model(name: str, stem: str, shortcut: str) -> None:
    model = resnet(name, stem=stem, shortcut=shortcut)
    passes = assert_same_step(model, images(size=8 if stem == "cifar" else 32))
    assert len(passes.results) > sum(1 for _ in model.blocks()) + 1


@pytest.mark.parametrize("recompute", [1, 2, 3, 100])
def test_same_bits_for_any_number_in_a_row(recompute: int) -> None:
    model = resnet("resnet34")
    expected = gradients(keeping(model), images())
    for block in model.blocks():
        block.recompute = recompute
    with Passes() as passes:
        actual = gradients(model, images())
    assert_same_bits(actual, expected)
    # 17 outputs in the forward. In the backward the stem's, and of every stage's 3, 4, 6, 3 blocks
    # the first, which needs no other, and so on; the stem's comes before the first stage's.
    counts = {1: 1 + 1 + 2 + 3 + 2, 2: 1 + 2 + 3 + 4 + 2, 3: 1 + 2 + 3 + 5 + 3, 100: 17}
    assert len(passes.results) == 17 + counts[recompute]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_same_bits_in_every_dtype(dtype: torch.dtype) -> None:
    assert_same_step(resnet().to(dtype), images().to(dtype))


def under_autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def under_hooks(model: nn.Module, x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        return model(x)


def on_cpu(model: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return model(x)


def whole_checkpoint(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


def block_checkpoints(model: FusedResNet, x: Tensor, use_reentrant: bool) -> Tensor:
    x = model._stem(x.contiguous(memory_format=torch.channels_last))
    for block in model.blocks():
        x = checkpoint(block, x, use_reentrant=use_reentrant)
    return model.fc(model.avgpool(x).flatten(1))


def every_other_block_checkpoint(model: FusedResNet, x: Tensor) -> Tensor:
    x = model._stem(x.contiguous(memory_format=torch.channels_last))
    for i, block in enumerate(model.blocks()):
        x = checkpoint(block, x, use_reentrant=False) if i % 2 else block(x)
    return model.fc(model.avgpool(x).flatten(1))


def sequential_checkpoint(model: FusedResNet, x: Tensor) -> Tensor:
    x = model._stem(x.contiguous(memory_format=torch.channels_last))
    x = checkpoint_sequential(list(model.blocks()), 3, x, use_reentrant=False)
    return model.fc(model.avgpool(x).flatten(1))


FORWARDS = {
    "autocast": under_autocast,
    "saved tensors hooks": under_hooks,
    "save_on_cpu": on_cpu,
    "checkpoint": whole_checkpoint,
    "checkpoint of each block": partial(block_checkpoints, use_reentrant=False),
    "reentrant checkpoint of each block": partial(block_checkpoints, use_reentrant=True),
    "checkpoint of every other block": every_other_block_checkpoint,
    "checkpoint_sequential": sequential_checkpoint,
}


@pytest.mark.parametrize("how", FORWARDS)
def test_same_bits_under(how: str) -> None:
    assert_same_step(resnet(), images(), FORWARDS[how])


FREEZES: dict[str, Callable[[FusedResNet], object]] = {
    "the stem and the first stage": lambda m: [
        p.requires_grad_(False) for part in (m.conv1, m.bn1, m.layer1) for p in part.parameters()
    ],
    "all but the classifier": lambda m: [
        p.requires_grad_(False) for name, p in m.named_parameters() if "fc" not in name
    ],
    "all convolutions": lambda m: [
        p.requires_grad_(False) for name, p in m.named_parameters() if "conv" in name
    ],
    "all BatchNorms": lambda m: [
        p.requires_grad_(False) for name, p in m.named_parameters() if "bn" in name
    ],
    "one BatchNorm's statistics": lambda m: m.layer1[1].bn2.eval(),
    "all statistics": lambda m: [b.eval() for b in m.modules() if isinstance(b, nn.BatchNorm2d)],
}


@pytest.mark.parametrize("what", FREEZES)
def test_same_bits_with_frozen(what: str) -> None:
    model = resnet()
    FREEZES[what](model)
    assert_same_step(model, images())


@pytest.mark.parametrize("name", ["layer1.1.conv1", "layer1.1.bn1", "layer2.0.downsample.0"])
def test_same_bits_where_a_reader_runs_as_a_module(name: str) -> None:
    model = resnet()
    model.get_submodule(name).register_forward_hook(lambda module, args, output: None)
    assert_same_step(model, images())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_same_bits_of_what_is_not_finite(value: float) -> None:
    model, x = resnet(), images()
    x[0, 0, 3, 3] = value
    assert_same_step(model, x, equal_nan=True)
    assert model.conv1.weight.grad.isnan().any()


def test_same_bits_in_distributed_data_parallel() -> None:
    model = resnet()
    expected = gradients(keeping(model), images())
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        actual = gradients(model, images(), lambda _, x: wrapped(x))
    finally:
        torch.distributed.destroy_process_group()
    assert_same_bits(actual, expected)


def test_copies_and_sums_of_gradients() -> None:
    model = copy.deepcopy(resnet())
    kept = keeping(model)
    for _ in range(2):  # without zero_grad between
        actual, expected = gradients(model, images()), gradients(kept, images())
    assert_same_bits(actual, expected)


# ---- less memory


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Of the distinct storages that autograd saves in a forward, parameters apart."""
    saved: dict[int, Tensor] = {}
    with saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        model(x)
    for parameter in model.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(t.untyped_storage().nbytes() for t in saved.values())


def outputs(model: FusedResNet, x: Tensor) -> list[int]:
    """Bytes of the stem's output and of each block's."""
    found: list[int] = []
    hooks = [
        module.register_forward_hook(lambda module, args, y: found.append(y.nbytes))
        for module in (model.maxpool, *model.blocks())
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("name", "recomputed"),
    [
        ("resnet18", RECOMPUTED),
        # Stages of 3, 4, 6 and 3 blocks.
        ("resnet50", [True, *[True] * 3, *[True] * 3, False, *[True] * 3, False, True, True,
                      *[False] * 3]),
    ],
)  # fmt: skip
def test_what_is_not_kept(name: str, recomputed: list[bool]) -> None:
    model, x = resnet(name), images()
    sizes = outputs(model, x)
    assert len(sizes) == len(recomputed)
    less = sum(size for size, again in zip(sizes, recomputed, strict=True) if again)
    assert kept_bytes(keeping(model), x) - kept_bytes(model, x) == less


def test_a_shortcut_that_only_the_output_needs_is_not_kept_in_its_place() -> None:
    model, x = resnet(shortcut="zero_pad"), images()
    sizes = outputs(model, x)
    # The first blocks of stages 2 and 3 are kept, so the next ones are not.
    again = [True, True, False, False, True, False, True, False, False]
    less = sum(size for size, recomputed in zip(sizes, again, strict=True) if recomputed)
    assert kept_bytes(keeping(model), x) - kept_bytes(model, x) == less


def test_outputs_die_with_the_forward_and_again_in_the_backward() -> None:
    model = resnet()
    for _ in range(2):
        with Passes() as forward:
            loss = loss_of(model(images()))
        assert forward.alive[:-1] == [not again for again in RECOMPUTED[:-1]]
        with Passes() as backward:
            loss.backward()
        assert len(backward.results) == sum(RECOMPUTED)
        # The graph is still there, nothing that it computed is.
        assert loss.grad_fn is not None
        assert not any(forward.alive) and not any(backward.alive)


def test_at_most_two_are_computed_at_once() -> None:
    """The backward frees one stage's outputs before it computes the next one's."""
    model = resnet("resnet34")
    most = 0

    class Watch(Passes):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            result = super().__torch_dispatch__(func, types, args, kwargs)
            most = max(most, sum(self.alive))
            return result

    loss = loss_of(model(images()))
    with Watch():
        loss.backward()
    assert most == 2


def test_whoever_keeps_an_output_keeps_no_more_than_that() -> None:
    model = resnet()
    outputs: list[Tensor] = []
    model.layer1[0].register_forward_hook(lambda module, args, y: outputs.append(y))
    gradients(model, images())
    node = outputs[0].grad_fn
    assert node.recomputed is None
    with pytest.raises(RuntimeError, match="second time"):
        node.saved_tensors  # noqa: B018


# ---- autograd's rules


def test_retained_graph() -> None:
    model = resnet()
    kept = keeping(model)
    parameters = [[*m.parameters()] for m in (model, kept)]
    losses = [loss_of(m(images())) for m in (model, kept)]
    for retain in (True, True, False):
        actual, expected = (
            torch.autograd.grad(loss, of, retain_graph=retain)
            for loss, of in zip(losses, parameters, strict=True)
        )
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        losses[0].backward()


def test_gradients_of_some_parameters_only() -> None:
    """The backward stops before the node that would let the output go."""
    model = resnet()
    kept = keeping(model)
    results = []
    for m in (model, kept):
        loss = loss_of(m(images()))
        late = [m.layer2[0].conv1.weight, m.layer2[0].downsample[0].weight]
        some = torch.autograd.grad(loss, late, retain_graph=True)
        results.append([*some, *torch.autograd.grad(loss, [*m.parameters()])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["bn2.weight", "bn2.bias", "bn1.bias", "conv2.weight"])
def test_a_parameter_that_changed_since_is_refused(name: str) -> None:
    model = resnet()
    loss = loss_of(model(images()))
    with torch.no_grad():
        model.layer1[0].get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("before", [False, True], ids=["alone", "after a first derivative"])
def test_second_derivatives(before: bool) -> None:
    """Those of the model that keeps, also where a result was computed again without a graph."""
    model = nn.Sequential(FusedBasicBlock(8, 8), FusedBasicBlock(8, 8)).double()
    x = torch.randn(3, 8, 6, 6, dtype=torch.float64)
    found = []
    for m in (model, keeping(model)):
        parameters = [*m.parameters()]
        loss = loss_of(m(x))
        if before:
            late = m[1].conv1.weight  # the backward stops before the result is let go
            torch.autograd.grad(loss, late, retain_graph=True)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        norm = sum(gradient.square().sum() for gradient in gradients)
        found.append(torch.autograd.grad(norm, parameters))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def doubled(y: Tensor) -> Tensor:
    return y * 2


def doubled_unseen(y: Tensor) -> Tensor:
    """Twice y, with the gradient of y."""
    return y + y.detach()


@pytest.mark.parametrize(
    ("guard", "expected"), [(nullcontext, doubled), (torch.no_grad, doubled_unseen)],
    ids=["seen by autograd", "unseen"],
)  # fmt: skip
@pytest.mark.parametrize("block", [0, 2])
def test_an_output_that_a_hook_changes_in_place(block: int, guard, expected) -> None:
    model, other = resnet(), resnet()

    def change(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        with guard():
            y.mul_(2)

    [*model.blocks()][block].register_forward_hook(change)
    [*other.blocks()][block].register_forward_hook(lambda module, args, y: expected(y))
    assert_same_bits(gradients(model, images()), gradients(other, images()))


def test_hooks_see_outputs_and_their_gradients() -> None:
    seen: list[list[Tensor]] = []
    model = resnet()
    for m in (model, keeping(model)):
        found: list[Tensor] = []
        seen.append(found)
        for block in m.blocks():
            block.register_forward_hook(lambda module, args, y, found=found: found.append(y))
            block.register_forward_hook(
                lambda module, args, y, found=found: [y.register_hook(found.append), None][1]
            )
        gradients(m, images())
    assert len(seen[0]) == len(seen[1]) == 16
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)


# ---- where nothing is recorded


def test_without_gradients_nothing_is_recomputed() -> None:
    model = resnet()
    with torch.no_grad():
        y = model(images())
    assert y.grad_fn is None
    with torch.inference_mode():
        assert torch.equal(resnet()(images()), y)
    traced = torch.jit.trace(resnet(), (images(),), check_trace=False)
    assert torch.equal(traced(images()), y)


def test_vmap_over_a_training_forward() -> None:
    blocks = nn.Sequential(FusedBasicBlock(8, 8), FusedBasicBlock(8, 8)).train()
    for module in blocks.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    blocks.requires_grad_(False)
    x = torch.randn(2, 3, 8, 6, 6)
    together = torch.func.vmap(blocks)(x)
    torch.testing.assert_close(together, torch.stack([blocks(part) for part in x]))


@pytest.mark.parametrize("block", [FusedBasicBlock, FusedBottleneck])
def test_one_block_alone(block: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = block(8 * block.expansion, 8).train()
    x = torch.randn(3, 8 * block.expansion, 6, 6)
    assert_same_step(module, x)

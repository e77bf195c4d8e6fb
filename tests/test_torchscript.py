"""The family in TorchScript, torch.compile and torch.export: the answers of eager mode."""

import copy
import io
import re

import pytest
import torch
import torchvision
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastres
from fastres import models
from fastres.models.resnet import BasicBlock, FusedBasicBlock, FusedResNet
from tolerances import assert_within_twice, relative_error

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated")
fused_or_plain = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


FAMILY = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


def build(name="resnet18", *, fused=True, stem="cifar", num_classes=10, **kwargs):
    """A model with running statistics that are not the initial ones."""
    with torch.device("meta"):  # the usual initialisation takes longer than the tests
        model = getattr(models, name)(fused=fused, stem=stem, num_classes=num_classes, **kwargs)
    return with_values(model)


def two_stages(kind):
    """A model of two blocks, which takes less long to compile: ours, or torchvision's fused."""
    with torch.device("meta"):
        if kind == "fastres":
            model = FusedResNet(FusedBasicBlock, [1, 1, 1, 1], stem="cifar")
        else:
            model = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1])
        model.layer3, model.layer4 = nn.Identity(), nn.Identity()
        model.fc = nn.Linear(128, 4)
    model = with_values(model)
    return model if kind == "fastres" else fastres.fuse_model(model, inplace=True)


class Own(nn.Module):
    """Somebody's network, with one ReLU in several places."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.last = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), self.relu)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.last(self.relu(self.bn2(self.conv2(x)) + x)).mean((2, 3))


def small(kind):
    return two_stages("fastres") if kind == "fastres" else fastres.fuse_model(Own())


def block_or_own(kind):
    """Still less to compile, for compilers that make C++ of it; and the size of its images."""
    return (build().layer2[0], (64, 8, 8)) if kind == "fastres" else (small(kind), (3, 16, 16))


ours_or_own = pytest.mark.parametrize("kind", ["fastres", "own"])


def with_values(model):
    torch.manual_seed(0)
    model.to_empty(device="cpu")
    for key, value in model.state_dict().items():
        if value.dim() > 1:
            value.normal_(0, value[0].numel() ** -0.5)
        elif value.is_floating_point():
            value.uniform_(0.5, 1)
        else:
            value.zero_()
        if key.endswith("running_mean"):
            value.sub_(0.75)
    return model


def saved_and_loaded(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


def assert_same_answers(scripted, model, x):
    with torch.no_grad():
        expected = model(x)
        for _ in range(3):  # the second and third calls run the optimized graph
            assert relative_error(scripted(x), expected) < 1e-5


@pytest.mark.fits_in("torch.jit.script: frozen, saved, loaded", "Compilers and exporters")
@fused_or_plain
@pytest.mark.parametrize("name", FAMILY)
def test_script_freeze_save_load(name, fused):
    model = build(name, fused=fused).eval()
    x = torch.randn(2, 3, 16, 16)
    scripted = torch.jit.freeze(torch.jit.script(model))
    assert_same_answers(saved_and_loaded(scripted), model, x)


@pytest.mark.fits_in("torch.jit.trace: frozen, saved, loaded", "Compilers and exporters")
@pytest.mark.parametrize(
    ("name", "fused"), [("resnet18", False), *((name, True) for name in FAMILY)]
)
def test_trace_freeze_save_load(name, fused):
    model = build(name, fused=fused).eval()
    x = torch.randn(2, 3, 16, 16)
    frozen = torch.jit.freeze(torch.jit.trace(model, x, check_trace=False))
    assert_same_answers(saved_and_loaded(frozen), model, torch.randn(3, 3, 20, 16))
    if fused:
        graph = str(frozen.inlined_graph)
        assert "fastres::conv_bn_relu" in graph
        assert "fastres::pack_conv_weight" not in graph  # freezing has packed the weights


@pytest.mark.fits_in("torch.jit.script with every stem and shortcut", "Compilers and exporters")
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("shortcut", ["projection", "zero_pad"])
def test_script_with_every_stem_and_shortcut(stem, shortcut):
    model = build(stem=stem, shortcut=shortcut).eval()
    assert_same_answers(torch.jit.script(model), model, torch.randn(2, 3, 32, 32))


@pytest.mark.fits_in("torch.jit.script in training", "Compilers and exporters")
@pytest.mark.parametrize(
    ("name", "fused"), [("resnet18", False), ("resnet18", True), ("resnet50", True)]
)
def test_script_in_train_mode(name, fused):
    model = build(name, fused=fused).train()
    scripted = torch.jit.script(copy.deepcopy(model))
    x = torch.randn(4, 3, 16, 16)
    expected, actual = model(x), scripted(x)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    for (key, p), q in zip(model.named_buffers(), scripted.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-4, msg=key)
    actual.sum().backward()
    assert all(p.grad is not None for p in scripted.parameters())
    model.load_state_dict(scripted.state_dict())
    assert_same_answers(scripted.eval(), model.eval(), x)


@pytest.mark.parametrize("how", ["script", "trace"])
def test_the_max_pool_is_an_op(how):
    model, x = build(stem="imagenet").eval(), torch.randn(2, 3, 32, 32)
    scripted = torch.jit.script(model) if how == "script" else torch.jit.trace(model, x)
    frozen = torch.jit.freeze(scripted)
    assert_same_answers(saved_and_loaded(frozen), model, torch.randn(1, 3, 40, 36))
    graph = str(frozen.inlined_graph)
    assert "fastres::max_pool2d" in graph
    if how == "trace":
        assert "aten::max_pool2d" not in graph


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(3, 2, 1), nn.Identity()],
    ids=["ceil mode", "average", "none"],
)
def test_script_of_another_pool(pool):
    model = build(stem="imagenet").eval()
    model.maxpool = pool
    scripted = torch.jit.script(model)
    assert_same_answers(scripted, model, torch.randn(1, 3, 40, 36))
    assert "fastres::max_pool2d" not in str(torch.jit.freeze(scripted).inlined_graph)


def test_script_folds_in_eval_mode_only():
    model = build()
    graph = str(torch.jit.freeze(torch.jit.script(model.eval())).inlined_graph)
    assert graph.count("fastres::conv_bn_relu") == 20
    model.layer1[0].bn1.register_forward_pre_hook(no_hook)
    graph = str(torch.jit.freeze(torch.jit.script(model)).inlined_graph)
    assert graph.count("fastres::conv_bn_relu") == 18


def no_hook(self: nn.Module, args: tuple[torch.Tensor]) -> None:
    return None


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.layer2[0], "bn2", nn.Identity()),
        lambda m: setattr(m.layer2[0], "relu", nn.ReLU6()),
        lambda m: setattr(m.layer2[0].downsample, "1", nn.Identity()),
        lambda m: setattr(m, "bn1", nn.GroupNorm(8, 64)),
        lambda m: setattr(m.layer1[0], "bn1", nn.BatchNorm2d(64, track_running_stats=False)),
    ],
    ids=["identity", "relu6", "shortcut identity", "group norm", "no running statistics"],
)
def test_script_of_a_changed_model(change):
    model = build()
    change(model)
    model.eval()
    assert_same_answers(torch.jit.script(model), model, torch.randn(2, 3, 16, 16))


@pytest.mark.fits_in("torch.jit: saved, loaded, given new weights", "Compilers and exporters")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_new_weights_in_a_compiled_model_count(how):
    model, x = build().eval(), torch.randn(2, 3, 16, 16)
    scripted = torch.jit.script(model) if how == "script" else torch.jit.trace(model, x)
    scripted = saved_and_loaded(scripted)
    for _ in range(3):
        state = {key: value * 1.1 for key, value in model.state_dict().items()}
        model.load_state_dict(state)
        scripted.load_state_dict(state)
        assert_same_answers(scripted, model, x)


def test_scripting_leaves_the_model_as_it_was():
    model = build().eval()
    types = [type(m) for m in model.modules()]
    torch.jit.script(model)
    assert [type(m) for m in model.modules()] == types


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_compiles(model, x, train, **options):
    model.train(train)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, **options)
    with torch.set_grad_enabled(train):
        expected, actual = eager(x), compiled(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    if train:
        expected.square().sum().backward()
        actual.square().sum().backward()
        for (key, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=key)
        for (key, p), q in zip(eager.named_buffers(), model.buffers(), strict=True):
            torch.testing.assert_close(q, p, msg=key)


@pytest.mark.fits_in("torch.compile in one graph", "Compilers and exporters")
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_compile_in_one_graph(name, train):
    assert_compiles(build(name), torch.randn(4, 3, 16, 16), train, backend="aot_eager")


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compile_with_a_max_pool(train):
    class Stem(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model.layer1(self.model._stem(x))

    stem = Stem(build(stem="imagenet"))
    assert_compiles(stem, torch.randn(2, 3, 32, 32), train)


@pytest.mark.fits_in('torch.compile(mode="reduce-overhead")', "Compilers and exporters")
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@ours_or_own
def test_compile_to_reduce_overhead(train, kind):
    """Which takes CUDA graphs where there is CUDA."""
    model, size = block_or_own(kind)
    assert_compiles(model, torch.randn(2, *size), train, mode="reduce-overhead")


@pytest.mark.fits_in("torch.compile with a dynamic batch", "Compilers and exporters")
@ours_or_own
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compile_with_any_batch(train, kind):
    model = small(kind).train(train)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.set_grad_enabled(train):
        for n in (2, 3, 7):
            x = torch.randn(n, 3, 16, 16)
            torch.testing.assert_close(compiled(x), eager(x))


@pytest.mark.fits_in("torch.compile under autocast", "Compilers and exporters")
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compile_under_autocast(train):
    block = build().layer2[0].train(train)
    x = torch.randn(2, 64, 8, 8)
    expected_block = copy.deepcopy(block)
    exact = copy.deepcopy(block).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
        expected = expected_block(x)
    assert actual.dtype == torch.bfloat16
    # A weight that is packed beforehand may go to another kernel, which rounds otherwise.
    assert_within_twice(actual.detach(), expected.detach(), exact.detach())


def test_compile_with_cumulative_statistics():
    block = build().layer2[0]
    block.bn1.momentum = None
    assert_compiles(block, torch.randn(2, 64, 8, 8), True, backend="aot_eager")


@pytest.mark.fits_in(
    "torch.compile: training and evaluation in turn, compiled once each",
    "Compilers and exporters",
)
@ours_or_own
def test_train_and_eval_in_turn_are_compiled_once_each(kind):
    model, x = small(kind), torch.randn(4, 3, 16, 16)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = None
    for _ in range(3):
        model.train()
        compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            after = compiled(x)
            torch.testing.assert_close(after, copy.deepcopy(model)(x))
        assert before is None or not torch.allclose(after, before, rtol=1e-2)
        before = after
    assert counter.frame_count == 2


@pytest.mark.fits_in("torch.export with a dynamic batch", "Compilers and exporters")
@pytest.mark.parametrize(
    ("name", "stem"), [("resnet18", "cifar"), ("resnet50", "cifar"), ("resnet18", "imagenet")]
)
def test_export_with_any_batch(name, stem):
    model = build(name, stem=stem).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: batch},)
    )
    module = exported.module()
    for n in (1, 2, 5):
        x = torch.randn(n, 3, 16, 16)
        with torch.no_grad():
            # The graph packs no weights, which can make other algorithms the cheapest.
            torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert "fastres.conv_bn_relu.default" in targets
    assert ("fastres.max_pool2d.default" in targets) == (stem == "imagenet")
    assert "fastres.pack_conv_weight.default" not in targets


@pytest.mark.fits_in(
    "fuse_model, then torch.jit.script, torch.jit.trace or torch.export, saved and loaded",
    "Compilers and exporters",
)
@pytest.mark.parametrize("how", ["script", "trace", "export"])
def test_torchvisions_model_that_was_fused(how):
    model, x = two_stages("torchvision").eval(), torch.randn(2, 3, 32, 32)
    if how == "export":
        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        graph = str(loaded.graph)
    else:
        compiled = torch.jit.script(model) if how == "script" else torch.jit.trace(model, x)
        loaded = saved_and_loaded(torch.jit.freeze(compiled))
        graph = str(loaded.inlined_graph)
    assert_same_answers(loaded, model, torch.randn(5, 3, 32, 32))
    assert len(re.findall(r"fastres[:.]+conv_bn_relu", graph)) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_program_in_torchs_own_operators(train, dtype):
    model, x = two_stages("fastres").train(train).to(dtype), torch.randn(2, 3, 16, 16, dtype=dtype)
    exported = torch.export.export(model, (x,))
    assert "fastres." in str(exported.graph)
    plain = exported.run_decompositions(fastres.ops.decompositions())
    assert "fastres." not in str(plain.graph)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float64: 1e-9}[dtype]
    torch.testing.assert_close(plain.module()(x), model(x), rtol=tolerance, atol=tolerance)


def test_a_program_of_residual_adds_in_torchs_own_operators():
    class Residual(nn.Module):
        def forward(self, x):
            return torch.relu(x + x.flip(0))

    model, x = fastres.fuse_model(Residual()), torch.randn(2, 3, 4, 4)
    exported = torch.export.export(model, (x,))
    assert "fastres.add_relu" in str(exported.graph)
    plain = exported.run_decompositions(fastres.ops.decompositions())
    assert "fastres." not in str(plain.graph)
    torch.testing.assert_close(plain.module()(x), model(x))


def test_export_of_a_module_in_two_places():
    block, x = build().layer1[0].eval(), torch.randn(2, 64, 8, 8)
    model = nn.Sequential(block, block)
    exported = torch.export.export(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), model(x))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("fastres.conv_bn_relu.default") == 4
    assert not any(target.startswith(("aten.conv2d", "aten.batch_norm")) for target in targets)


@pytest.mark.fits_in("a package of AOTInductor, with a dynamic batch", "Compilers and exporters")
@ours_or_own
def test_a_package_of_aot_inductor(tmp_path, kind):
    """The ops in it are ours, called from compiled C++."""
    model, size = block_or_own(kind)
    model.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(
            model, (torch.randn(2, *size),), dynamic_shapes=({0: batch},)
        )
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "model.pt2")
        )
        package = torch._inductor.aoti_load_package(path)
        for n in (1, 2, 5):
            x = torch.randn(n, *size)
            torch.testing.assert_close(package(x), model(x))

"""fuse_model: other people's models, their answers, and all that is attached to them."""

import copy
import functools
import io
import pickle
import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from conditioning import well_conditioned
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.misc import FrozenBatchNorm2d

import fastres
from fastres import ops
from recording import convolutions_of
from tolerances import largest_error, relative_error


def resnet(block=BasicBlock, **arguments):
    """torchvision's without its wide stages, in which the tests would spend their time."""
    model = torchvision.models.ResNet(block, [1, 1, 1, 1], **arguments)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(128 * block.expansion, 10)
    return model


def backbone():
    """Of torchvision's detection models: frozen BatchNorms, feature maps in a dictionary."""
    model = resnet(norm_layer=FrozenBatchNorm2d)
    model.conv1.requires_grad_(False)
    return IntermediateLayerGetter(model, {"layer1": "0", "layer2": "1"})


def regnet(**arguments):
    with torch.device("cpu"):  # reads its sizes from tensors
        blocks = torchvision.models.regnet.BlockParams.from_init_params(
            depth=2, w_0=16, w_a=16, w_m=2.5, group_width=8, **arguments
        )
    return torchvision.models.RegNet(blocks, num_classes=10)


def timm_resnet(block="BasicBlock", **arguments):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install -e '.[test]'")
    return timm.models.resnet.ResNet(
        getattr(timm.models.resnet, block),
        (2, 1, 1, 1),
        channels=(64, 16, 16, 16) if block == "BasicBlock" else (16, 16, 16, 16),
        num_classes=10,
        **arguments,
    )


def timm_resnetv2():
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install -e '.[test]'")
    return timm.create_model("resnetv2_50", layers=(1, 1), channels=(32, 64), num_classes=10)


def hugging_face(**arguments):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install -e '.[test]'"
    )
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 1], "num_labels": 10}
    config = transformers.ResNetConfig(**sizes, **arguments)
    return transformers.ResNetForImageClassification(config)


MODELS = {
    "torchvision's ResNet": resnet,
    "torchvision's ResNet, bottlenecks": lambda: resnet(Bottleneck),
    "torchvision's Wide ResNet": lambda: resnet(Bottleneck, width_per_group=128),
    "torchvision's ResNeXt": lambda: resnet(Bottleneck, groups=4, width_per_group=4),
    "torchvision's RegNet X": regnet,
    "torchvision's RegNet Y": lambda: regnet(se_ratio=0.25),
    "torchvision's ResNet, FrozenBatchNorm2d": lambda: resnet(norm_layer=FrozenBatchNorm2d),
    "torchvision's detection backbone": backbone,
    "timm's ResNet": timm_resnet,
    "timm's ResNet-D": lambda: timm_resnet(
        "Bottleneck", stem_type="deep", stem_width=8, avg_down=True
    ),
    "timm's ResNeXt": lambda: timm_resnet("Bottleneck", cardinality=4, base_width=8),
    "timm's SE-ResNet": lambda: timm_resnet(block_args={"attn_layer": "se"}),
    "timm's SE-ResNeXt": lambda: timm_resnet(
        "Bottleneck", cardinality=4, base_width=8, block_args={"attn_layer": "se"}
    ),
    "timm's ResNetV2": timm_resnetv2,
    "Hugging Face's ResNet": hugging_face,
    "Hugging Face's ResNet, basic blocks": lambda: hugging_face(layer_type="basic"),
}


def build(name):
    """The model with weights and statistics as of a trained one, and its input (N, 3, H, W)."""
    return with_values(MODELS[name]), torch.randn(2, 3, 32, 24)


def with_values(make):
    torch.manual_seed(0)
    with torch.device("meta"):  # the usual initialisation takes longer than the tests
        model = make()
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        if value.dim() > 1:
            value.normal_(0, value[0].numel() ** -0.5)
        elif value.is_floating_point():
            value.uniform_(0.5, 1.5)
        else:
            value.zero_()
    return well_conditioned(model)


def tensors_of(output):
    """All the tensors in what a model returns."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors_of(value)]


def step(model, x, train, turned=False):
    """Results, gradients and buffers of one forward and backward, by name.

    `turned`: the images go through the model in the opposite order, as for another rounding.
    """
    model = copy.deepcopy(model).train(train)
    x = x.clone().requires_grad_()
    outputs = tensors_of(model(x.flip(0) if turned else x))
    if turned:
        outputs = [output.flip(0) for output in outputs]
    random = torch.Generator().manual_seed(1)
    sum(
        (output * torch.randn(output.shape, generator=random, dtype=torch.float64)).sum()
        for output in outputs
    ).backward()
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    results |= {k: v.clone() for k, v in model.named_buffers() if v.is_floating_point()}
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    results["gradients"] = torch.cat([g.flatten() for g in gradients])
    results["input's gradient"] = x.grad
    return results


def torch_runs(model, x, train):
    """torch's own results: its rounding differs by layout, by order and by threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for images in (x, x.contiguous(memory_format=torch.channels_last)):
                results += [step(model, images, train, turned) for turned in (False, True)]
    finally:
        torch.set_num_threads(before)
    return results


def worst(key, results, exact):
    """The largest of the results' errors: relative, and of the worst element."""
    return [
        max(error(run[key], exact[key]) for run in results)
        for error in (relative_error, largest_error)
    ]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.fits_in(name, "Models that others wrote"))
        for name in MODELS
    ],
)
def test_answers_gradients_and_statistics(name, train):
    model, x = build(name)
    fused = fastres.fuse_model(model)
    exact = step(copy.deepcopy(model).double(), x.double(), train)
    same = step(copy.deepcopy(fused).double(), x.double(), train)
    ours = step(fused, x, train)
    theirs = torch_runs(model, x, train)
    assert ours.keys() == exact.keys()
    for key in exact:
        torch.testing.assert_close(same[key], exact[key], rtol=1e-8, atol=1e-9, msg=key)
        # The worst element of a whole model is luck, in torch too: four times its error.
        for found, yardstick, factor, floor in zip(
            worst(key, [ours], exact), worst(key, theirs, exact), (2, 4), (2e-7, 2e-6), strict=True
        ):
            assert found <= factor * yardstick + floor, key


@pytest.mark.parametrize(
    ("library", "make"),
    [
        ("torchvision", lambda library: library.models.resnet50()),
        ("torchvision", lambda library: library.models.wide_resnet50_2()),
        ("timm", lambda library: library.create_model("resnet50")),
        (
            "transformers",
            lambda library: library.ResNetForImageClassification(
                library.ResNetConfig(num_labels=1000)
            ),
        ),
    ],
    ids=["resnet50", "wide_resnet50_2", "timm's resnet50", "Hugging Face's ResNet-50"],
)
def test_published_models(library, make):
    library = pytest.importorskip(library, reason="pip install -e '.[test]'")
    model, x = with_values(lambda: make(library)).eval(), torch.randn(1, 3, 64, 64)
    fused = fastres.fuse_model(model)
    assert (len(fused.fastres_report.fused), fused.fastres_report.left) == (53, ())
    with torch.no_grad():
        ours, theirs = (tensors_of(m(x))[0] for m in (fused, model))
        (exact,) = tensors_of(model.double()(x.double()))
    assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact) + 2e-7


@pytest.mark.fits_in("torchvision's Faster R-CNN, whole", "Models that others wrote")
def test_a_whole_detector():
    """Its losses with their gradients, and its boxes; the backbone is all that is fused."""
    few = {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 20}
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d
    )
    model = FasterRCNN(backbone, num_classes=3, min_size=64, max_size=96, **few).double()
    fused = fastres.fuse_model(model)
    report = fused.fastres_report
    assert len(report.fused) == 20
    assert all(layer.name.startswith(("backbone.fpn.", "rpn.")) for layer in report.left)
    images = [torch.rand(3, *size, dtype=torch.float64) for size in ((64, 80), (70, 64))]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0]], dtype=torch.float64)
    targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in images]

    def found(detector):
        torch.manual_seed(0)  # draws the regions that it trains on
        losses = detector.train()(images, targets)
        sum(losses.values()).backward()
        gradients = {k: p.grad for k, p in detector.named_parameters() if p.grad is not None}
        with torch.no_grad():
            return losses, gradients, detector.eval()(images)

    torch.testing.assert_close(found(fused), found(model), rtol=1e-8, atol=1e-10)


# By kind: conv + bn + relu, conv + bn + add + relu, conv + bn, add + relu; then the layers left.
COUNTS = {
    "torchvision's RegNet X": (5, 2, 2, 0, 0),
    "torchvision's RegNet Y": (5, 2, 2, 0, 4),
    "timm's ResNet": (6, 5, 3, 0, 0),
    "timm's ResNet-D": (13, 5, 4, 0, 0),
    "timm's SE-ResNeXt": (11, 3, 5, 2, 10),
    "timm's ResNetV2": (4, 0, 0, 0, 9),
    "Hugging Face's ResNet": (7, 3, 1, 0, 0),
    "Hugging Face's ResNet, basic blocks": (4, 3, 1, 0, 0),
    "torchvision's ResNet": (3, 2, 1, 0, 0),
    "torchvision's ResNet, bottlenecks": (5, 2, 2, 0, 0),
    "torchvision's detection backbone": (3, 2, 1, 0, 0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_report_says_what_was_fused_and_what_was_not(name):
    model, _ = build(name)
    report = fastres.fuse_model(model).fastres_report
    kinds = [unit.kind for unit in report.fused]
    names = ("conv + bn + relu", "conv + bn + add + relu", "conv + bn", "add + relu")
    assert (*(kinds.count(kind) for kind in names), len(report.left)) == COUNTS[name]
    mentioned = {layer for unit in report.fused for layer in unit.layers}
    left = {layer.name for layer in report.left}
    assert not mentioned & left
    assert mentioned | left >= {
        key
        for key, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | FrozenBatchNorm2d)
    }
    assert all(layer.reason for layer in report.left)
    assert str(report).startswith(f"{len(kinds)} units fused, {len(left)} layers left")


@pytest.mark.parametrize(
    "name",
    [
        "torchvision's ResNet",
        "timm's ResNet-D",
        "Hugging Face's ResNet",
        "torchvision's ResNet, FrozenBatchNorm2d",
    ],
)
def test_the_model_keeps_all_it_holds(name):
    model, _ = build(name)
    names = list(model.state_dict())
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    modules = dict(model.named_modules())
    classes = [type(module) for module in model.modules()]
    copied = fastres.fuse_model(model)
    assert [type(module) for module in model.modules()] == classes
    assert copied is not model and isinstance(copied, type(model))
    assert list(copied.state_dict()) == names
    assert fastres.fuse_model(model, inplace=True) is model
    for found, kept in (
        (dict(model.named_parameters()), parameters),
        (dict(model.named_buffers()), buffers),
        (dict(model.named_modules()), modules),
    ):
        assert list(found) == list(kept)
        assert all(found[key] is kept[key] for key in kept)
    assert list(model.state_dict()) == names
    for module, cls in zip(model.modules(), classes, strict=True):
        assert isinstance(module, cls)


@pytest.mark.parametrize("name", ["torchvision's ResNet", "timm's ResNet", "Hugging Face's ResNet"])
def test_copies_and_pickles_stay_fused(name):
    model, x = build(name)
    fused = fastres.fuse_model(model).eval()
    (expected,) = tensors_of(fused(x))
    classes = [type(module) for module in fused.modules()]
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert relative_error(tensors_of(copied(x))[0], expected) < 1e-6
        assert copied.fastres_report == fused.fastres_report
        assert [type(module) for module in copied.modules()] == classes
    again = fastres.fuse_model(fused, inplace=True)
    assert [type(module) for module in again.modules()] == classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_frozen_batch_norms_give_the_dtype_that_they_gave(dtype, autocast):
    model, x = build("torchvision's ResNet, FrozenBatchNorm2d")
    model, x = model.layer1.to(dtype), torch.randn(2, 64, 8, 8, dtype=dtype)
    fused = fastres.fuse_model(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        ours, theirs = fused(x), model(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet50",), "model is a str; expected a torch.nn.Module"),
        ((nn.ReLU, True), "model is a type; expected a torch.nn.Module"),
        ((nn.ReLU(), 1), "inplace is 1; expected True or False"),
        ((torch.jit.script(nn.ReLU()),), "model is a RecursiveScriptModule, .* TorchScript"),
        ((torch.compile(nn.ReLU()),), "model is compiled already; expected the model that was"),
    ],
    ids=["name", "class", "inplace", "TorchScript", "compiled"],
)
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises(TypeError, match=f"fuse_model: {message}"):
        fastres.fuse_model(*arguments)


# ---- blocks that somebody else wrote


class Unit(nn.Module):
    def __init__(self, c_in, c_out, activation=None):
        super().__init__()
        self.c = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.n = nn.BatchNorm2d(c_out)
        self.a = activation or nn.ReLU(inplace=True)

    def forward(self, x):
        return self.a(self.n(self.c(x)))


class Block(nn.Module):
    """A residual block of containers, with a switch."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Unit(8, 8), Unit(8, 8, nn.Identity()))
        self.drop = nn.Identity()
        self.last = nn.ReLU()
        self.scale = 1.0

    def forward(self, x):
        out = self.drop(self.body(x)) * self.scale if self.scale != 1.0 else self.body(x)
        return self.last(out + self.drop(x))


class Functional(Block):
    def forward(self, x):
        out = F.relu(self.body[0].n(self.body[0].c(x)), inplace=True)
        return torch.add(x, self.body[1].n(self.body[1].c(out))).relu()


class Broadcast(Block):
    def forward(self, x):
        out = self.body[0].n(self.body[0].c(x))
        return F.relu(out + x.mean((2, 3), keepdim=True))


class BroadcastOnly(Block):
    def forward(self, x):
        return self.last(self.body[0](x) + x.mean((2, 3), keepdim=True))


class TwoUses(Block):
    def forward(self, x):
        z = self.body[0].n(self.body[0].c(x))
        return self.last(z) + z


class InPlace(Block):
    """What the convolution reads changes after it, before its unit ends."""

    def forward(self, x):
        x = x * 1
        z = self.body[0].c(x)
        x += 1
        return self.last(self.body[0].n(z)) + x


class Sum(Block):
    """The sum goes into a tensor that is read again."""

    def forward(self, x):
        out = self.body[0](x)
        y = out
        out += x
        return self.last(out) + y


OTHERS = {
    "block": (Block, 2),
    "functions": (Functional, 2),
    "broadcast": (Broadcast, 1),
    "broadcast add and relu": (BroadcastOnly, 2),
    "two uses": (TwoUses, 1),
    "swish": (lambda: nn.Sequential(Unit(8, 8, nn.SiLU(inplace=True))), 1),
    "bias": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), 1),
    "momentum": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8, momentum=None)),
        1,
    ),
}


def randomised(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.running_var):
                nn.init.uniform_(value, 0.5, 2)
            for value in (module.bias, module.running_mean):
                nn.init.uniform_(value, -1, 1)
    return model


def assert_same_steps(model, fused, x):
    for train in (False, True):
        theirs, ours = step(model, x, train), step(fused, x, train)
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.fits_in("a network of one's own", "Models that others wrote")
@pytest.mark.parametrize("kind", OTHERS)
def test_blocks_that_others_wrote(kind):
    make, units = OTHERS[kind]
    model = randomised(make()).double()
    fused = fastres.fuse_model(model)
    assert len(fused.fastres_report.fused) >= units
    assert_same_steps(model, fused, torch.randn(2, 8, 5, 6, dtype=torch.float64))


class Out(Block):
    """A function writes its result into what the convolution reads."""

    def forward(self, x):
        x = x * 1
        z = self.body[0].c(x)
        torch.mul(x, 2, out=x)
        return self.last(self.body[0].n(z)) + x


class Shortcut(Block):
    """The shortcut begins with a ReLU in place, in a container that has no units."""

    def __init__(self):
        super().__init__()
        self.shortcut = nn.Sequential(nn.ReLU(inplace=True), nn.AvgPool2d(1))

    def forward(self, x):
        x = x * 1
        z = self.body[0].n(self.body[0].c(x))
        return self.last(z + self.shortcut(x))


@pytest.mark.parametrize("kind", [InPlace, Sum, Out, Shortcut])
def test_what_changes_in_place_is_seen(kind):
    model, x = randomised(kind()).double().eval(), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fastres.fuse_model(model)(x), model(x))


class ManyArguments(Unit):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class Branch(Unit):
    def forward(self, x):
        return super().forward(x) if x.shape[0] > 1 else x


class Draws(Unit):
    def forward(self, x):
        return super().forward(x) if torch.rand(()) < 2 else x


class Differs(Unit):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.0, self.training))


class Counts(Unit):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class Keywords(Unit):
    def forward(self, x):
        return self.a(self.n(input=self.c(input=x)))


class ChangesInPlace(Unit):
    def forward(self, x):
        z = self.c(x.mul_(1))
        x.mul_(1)
        return self.n(z)


class DiffersByLayer(Unit):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.0, self.n.training))


class FrozenPart(Unit):
    def forward(self, x):
        with torch.no_grad():
            x = super().forward(x)
        return x + self.n.bias.view(-1, 1, 1)


class WithoutAutocast(Unit):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class Checkpoints(Unit):
    use_reentrant = False

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.use_reentrant)


class CheckpointsReentrant(Checkpoints):
    use_reentrant = True


class Reversed(torch.autograd.Function):
    """The gradient is turned."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return -dy


class OwnFunction(Unit):
    def forward(self, x):
        return super().forward(Reversed.apply(x))


class ReadsABuffer(Unit):
    def forward(self, x):
        return super().forward(x) * (2 if self.n.num_batches_tracked.item() else 1)


class ReadsAnArray(Unit):
    def __init__(self, *args):
        super().__init__(*args)
        self.factors = np.ones(3)

    def forward(self, x):
        return super().forward(x) * float(self.factors[0])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ManyArguments, "takes more than one argument"),
        (Branch, "can't be traced"),
        (Draws, "draws random numbers|can't be traced"),
        (Differs, "does different things in training and in evaluation"),
        (Counts, "sets the attribute 'calls'"),
        (Keywords, "is called with other arguments than one tensor"),
        (ChangesInPlace, "something is changed in place before its unit ends"),
        (DiffersByLayer, "does different things in training and in evaluation"),
        (FrozenPart, "switches gradients for a part of it"),
        (WithoutAutocast, "switches autocast for a part of it"),
        (Checkpoints, "switches what is kept for the backward for a part of it"),
        (CheckpointsReentrant, "switches gradients for a part of it"),
        (OwnFunction, "switches gradients for a part of it"),
        (ReadsABuffer, "computes with a tensor that may be another one in the next call"),
        (ReadsAnArray, "reads the attribute 'factors', a ndarray, of which not every change"),
    ],
)
def test_what_has_no_graph_is_left_with_the_reason(kind, reason):
    model = nn.Sequential(randomised(kind(8, 8))).double()
    fused = fastres.fuse_model(model)
    assert not fused.fastres_report.fused
    assert {layer.name for layer in fused.fastres_report.left} == {"0.c", "0.n"}
    for layer in fused.fastres_report.left:
        assert re.search(reason, layer.reason)
    assert "calls" not in model[0].__dict__
    if kind is not ChangesInPlace:  # which has no gradient
        assert_same_steps(model, fused, torch.randn(2, 8, 5, 6, dtype=torch.float64))


def hook(module):
    module.register_forward_hook(lambda module, args, output: output * 1.5)


CHANGES = {
    "hook on a layer": lambda m: hook(m.body[0].c),
    "hook on a container": lambda m: hook(m.body[1]),
    "hook on a Sequential": lambda m: hook(m.body),
    "hook on what does nothing": lambda m: hook(m.drop),
    "pre-hook": lambda m: m.body.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "attribute": lambda m: setattr(m, "scale", 2.0),
    "other module": lambda m: setattr(m, "drop", nn.Tanh()),
    "other activation": lambda m: setattr(m.body[0], "a", nn.Tanh()),
    "other container": lambda m: m.body.__setitem__(0, nn.Identity()),
    "longer": lambda m: m.body.append(nn.Tanh()),
    "patched": lambda m: setattr(m.body[0], "forward", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_afterwards_counts(change):
    model = randomised(Block()).double()
    fused = fastres.fuse_model(model)
    CHANGES[change](model)
    CHANGES[change](fused)
    assert_same_steps(model, fused, torch.randn(2, 8, 5, 6, dtype=torch.float64))


class Reads(Unit):
    """A forward of everything that can be an attribute."""

    factor = 1.0

    def __init__(self):
        super().__init__(8, 8)
        self.size = (3, 3)
        self.factors = [1.0, {"last": 2.0}]
        self.config = SimpleNamespace(factor=1.5)
        self.activation = torch.sigmoid
        self.pool = functools.partial(F.avg_pool2d, kernel_size=2)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(super().forward(x), self.size)
        x = self.pool(x) * self.factor * self.factors[1]["last"] * self.config.factor
        x = self.activation(x) if self.c.stride == (1, 1) else x
        return self.end(x) + 1 if hasattr(self, "shift") else self.end(x)

    def end(self, x):
        return x * 2


READ_CHANGES = {
    "tuple": lambda m: setattr(m, "size", (4, 2)),
    "in a list": lambda m: m.factors[1].update(last=3.0),
    "in an object": lambda m: setattr(m.config, "factor", 3.0),
    "object": lambda m: setattr(m, "config", SimpleNamespace(factor=3.0)),
    "built-in function": lambda m: setattr(m, "activation", torch.tanh),
    "partial": lambda m: setattr(m, "pool", functools.partial(F.max_pool2d, kernel_size=2)),
    "of the class": lambda m: setattr(m, "factor", 3.0),
    "of a layer": lambda m: setattr(m.c, "stride", (2, 2)),
    "new": lambda m: setattr(m, "shift", True),
    "method": lambda m: setattr(m, "end", lambda x: x * 5),
    "nothing": lambda m: None,
    "not read": lambda m: setattr(m, "step", 3),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("change", READ_CHANGES)
def test_what_a_forward_reads_is_seen_to_change(change, compiled):
    model = randomised(Reads()).eval()
    fused = fastres.fuse_model(model)
    assert len(fused.fastres_report.fused) == 1
    torch.compiler.reset()
    call = torch.compile(fused, fullgraph=True, backend="aot_eager") if compiled else fused
    x = torch.randn(2, 8, 6, 7)
    with torch.no_grad():
        assert_close(call(x), model(x), 1e-6)
        READ_CHANGES[change](model)
        READ_CHANGES[change](fused)
        assert_close(call(x), model(x), 1e-6)
        assert convolutions_of(fused, x) == (change in ("nothing", "not read"))
    torch.compiler.reset()


def test_layers_that_hooks_watch_say_so():
    model = Block()
    hook(model.body[0].n)
    notes = [unit.note for unit in fastres.fuse_model(model).fastres_report.fused]
    assert notes == ["as its own modules while something is attached to body.0.n", ""]


# ---- what torch makes of a fused model


@pytest.mark.parametrize(
    ("name", "units"), [("timm's ResNet", [13]), ("Hugging Face's ResNet", [6])]
)
def test_without_gradients_blocks_are_one_call(name, units):
    model, x = build(name)
    fused = fastres.fuse_model(model).eval()
    expected = tensors_of(fused(x))[0]
    with mock.patch.object(ops, "conv_chain", wraps=ops.conv_chain) as chain, torch.no_grad():
        (actual,) = tensors_of(fused(x))
    assert [len(call.args[3]) for call in chain.call_args_list] == units
    assert relative_error(actual, expected) < 1e-6


def test_a_model_without_values():
    model = Block().to("meta")
    fused = fastres.fuse_model(model)
    assert len(fused.fastres_report.fused) == 2
    for train in (False, True):
        assert fused.train(train)(torch.empty(2, 8, 5, 6, device="meta")).shape == (2, 8, 5, 6)


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated")
def test_a_scripted_part_stays():
    part = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).eval())

    class Whole(Unit):
        def forward(self, x):
            return self.part(super().forward(x))

    model, x = Whole(8, 8).eval(), torch.randn(2, 8, 5, 6)
    model.part = part
    fused = fastres.fuse_model(model, inplace=True)
    assert [unit.layers for unit in fused.fastres_report.fused] == [("c", "n", "a")]
    assert_close(fused(x), part(F.relu(model.n(model.c(x)))), 1e-6)


def saved_and_loaded(save, load, made):
    file = io.BytesIO()
    save(made, file)
    file.seek(0)
    return load(file)


def assert_close(actual, expected, tolerance):
    for ours, theirs in zip(tensors_of(actual), tensors_of(expected), strict=True):
        assert relative_error(ours.detach(), theirs.detach()) < tolerance


def assert_fused(graph, model, less=0):
    """It calls an op for each of the model's units that have a convolution, but for `less`."""
    units = [unit for unit in model.fastres_report.fused if unit.kind.startswith("conv")]
    assert len(re.findall(r"fastres[:.]+conv_bn_relu\S*\(", str(graph))) == len(units) - less


# Hugging Face's own code cannot be scripted.
SCRIPTED = [name for name in MODELS if not name.startswith("Hugging Face")]


@pytest.mark.fits_in(
    "each but Hugging Face's by torch.jit.script, evaluation and training",
    "Models that others wrote",
)
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated")
@pytest.mark.parametrize("name", SCRIPTED)
def test_script(name):
    model, x = build(name)
    fused = fastres.fuse_model(model).eval()
    with torch.no_grad():
        frozen = torch.jit.freeze(torch.jit.script(fused))
        # TorchScript has no type for the dictionary of the container that calls the stem.
        assert_fused(frozen.inlined_graph, fused, less=name == "torchvision's detection backbone")
        loaded = saved_and_loaded(torch.jit.save, torch.jit.load, frozen)
        assert_close(loaded(x), model.eval()(x), 1e-5)
    scripted = torch.jit.script(copy.deepcopy(fused).train())
    assert_close(scripted(x), model.train()(x), 1e-3)


@pytest.mark.fits_in(
    "each by torch.jit.trace, torch.export and torch.compile", "Models that others wrote"
)
@pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.\w+` is deprecated", "ignore:Converting a tensor to a Python boolean"
)
@pytest.mark.parametrize("name", MODELS)
def test_trace_export_and_compile(name):
    model, x = build(name)
    fused = fastres.fuse_model(model).eval()
    if name.startswith("Hugging Face"):
        fused.config.return_dict = False  # a trace knows no such classes
    torch.compiler.reset()
    with torch.no_grad():
        expected = model.eval()(x)
        traced = torch.jit.freeze(torch.jit.trace(fused, x, strict=False))
        assert_fused(traced.inlined_graph, fused)
        loaded = saved_and_loaded(torch.jit.save, torch.jit.load, traced)
        assert_close(loaded(x), expected, 1e-5)
        batch = torch.export.Dim("batch", min=1, max=8)
        exported = torch.export.export(fused, (x,), dynamic_shapes=({0: batch},))
        assert_fused(exported.graph, fused)
        loaded = saved_and_loaded(torch.export.save, torch.export.load, exported).module()
        larger = torch.cat([x, x.flip(0)])
        assert_close(loaded(larger), model(larger), 1e-5)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), expected, 1e-5)
    compiled = torch.compile(copy.deepcopy(fused).train(), fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), model.train()(x), 1e-3)
    torch.compiler.reset()

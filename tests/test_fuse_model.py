"""fuse_model: other people's models, their answers, and all that is attached to them."""

import copy
import pickle

import pytest
import torch
import torchvision
from conditioning import well_conditioned
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.misc import FrozenBatchNorm2d

import fastres
from tolerances import largest_error, relative_error


def resnet(block=BasicBlock, **arguments):
    """torchvision's without its wide stages, in which the tests would spend their time."""
    model = torchvision.models.ResNet(block, [2, 1, 1, 1], **arguments)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(128 * block.expansion, 10)
    return model


def backbone():
    """Of torchvision's detection models: frozen BatchNorms, feature maps in a dictionary."""
    model = resnet(norm_layer=FrozenBatchNorm2d)
    model.conv1.requires_grad_(False)
    return IntermediateLayerGetter(model, {"layer1": "0", "layer2": "1"})


MODELS = {
    "resnet": resnet,
    "resnet, bottleneck": lambda: resnet(Bottleneck),
    "resnext": lambda: resnet(Bottleneck, groups=4, width_per_group=4),
    "wide resnet": lambda: resnet(Bottleneck, width_per_group=128),
    "frozen": lambda: resnet(norm_layer=FrozenBatchNorm2d),
    "detection": backbone,
}


def build(name):
    """The model with weights and statistics as of a trained one, and its input (N, 3, H, W)."""
    torch.manual_seed(0)
    with torch.device("meta"):  # the usual initialisation takes longer than the tests
        model = MODELS[name]()
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        if value.dim() > 1:
            value.normal_(0, value[0].numel() ** -0.5)
        elif value.is_floating_point():
            value.uniform_(0.5, 1.5)
        else:
            value.zero_()
    return well_conditioned(model), torch.randn(2, 3, 32, 24)


def tensors_of(output):
    """All the tensors in what a model returns."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors_of(value)]


def step(model, x, train):
    """Results, gradients and buffers of one forward and backward, by name."""
    model = copy.deepcopy(model).train(train)
    x = x.clone().requires_grad_()
    outputs = tensors_of(model(x))
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


def worst(key, results, exact):
    """The larger of torch's errors in its two layouts: relative, and of the worst element."""
    return [
        max(error(run[key], exact[key]) for run in results)
        for error in (relative_error, largest_error)
    ]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_gradients_and_statistics(name, train):
    model, x = build(name)
    fused = fastres.fuse_model(model)
    exact = step(copy.deepcopy(model).double(), x.double(), train)
    same = step(copy.deepcopy(fused).double(), x.double(), train)
    ours = step(fused, x, train)
    other_layout = x.contiguous(memory_format=torch.channels_last)
    theirs = [step(model, x, train), step(model, other_layout, train)]
    assert ours.keys() == exact.keys()
    for key in exact:
        torch.testing.assert_close(same[key], exact[key], rtol=1e-8, atol=1e-9, msg=key)
        # The worst element of a whole model is luck, in torch too: four times its error.
        for found, yardstick, factor, floor in zip(
            worst(key, [ours], exact), worst(key, theirs, exact), (2, 4), (2e-7, 2e-6), strict=True
        ):
            assert found <= factor * yardstick + floor, key


@pytest.mark.parametrize("name", MODELS)
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


@pytest.mark.parametrize("name", ["resnet", "frozen"])
def test_copies_and_pickles_stay_fused(name):
    model, x = build(name)
    fused = fastres.fuse_model(model).eval()
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(copied(x), fused(x))
        assert copied.fastres_report == fused.fastres_report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_frozen_batch_norms_give_the_dtype_that_they_gave(dtype, autocast):
    model, x = build("frozen")
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

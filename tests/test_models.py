"""The family against torchvision: parameters, state_dict, answers, gradients."""

import copy

import pytest
import torch
import torchvision
from conditioning import well_conditioned
from torch import nn
from torch.nn import functional as F

from fastres import models
from fastres.models.resnet import ZeroPadShortcut
from tolerances import largest_error, relative_error

DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def build(name, *, seed=0, **kwargs):
    torch.manual_seed(seed)
    return getattr(models, name)(**kwargs)


def build_torchvision(name, *, seed=0, **kwargs):
    torch.manual_seed(seed)
    return getattr(torchvision.models, name)(**kwargs)


def assert_same_state(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize("name", DEPTHS)
def test_same_seed_same_parameters_and_state_dict_both_ways(name):
    ours, theirs = build(name), build_torchvision(name)
    assert_same_state(ours, theirs)
    for source, target in ((theirs, ours), (ours, theirs)):
        for value in source.state_dict().values():
            value.add_(1)
        target.load_state_dict(source.state_dict(), strict=True)
        assert_same_state(ours, theirs)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {"num_classes": 10, "zero_init_residual": True}),
        ("resnet50", {"zero_init_residual": True, "groups": 32, "width_per_group": 4}),
        ("resnet50", {"width_per_group": 128}),
        ("resnet50", {"replace_stride_with_dilation": [False, True, True]}),
        ("resnet18", {"norm_layer": lambda channels: nn.GroupNorm(8, channels)}),
    ],
    ids=["zero_init", "resnext", "wide", "dilated", "group_norm"],
)
def test_torchvisions_keyword_arguments(name, kwargs):
    ours, theirs = build(name, **kwargs).eval(), build_torchvision(name, **kwargs).eval()
    assert_same_state(ours, theirs)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("by", ["name", "full name", "enum"])
def test_weights_go_through_torchvision(monkeypatch, by):
    enum = torchvision.models.ResNet18_Weights
    weights = {
        "name": "IMAGENET1K_V1",
        "full name": "ResNet18_Weights.IMAGENET1K_V1",
        "enum": enum.IMAGENET1K_V1,
    }[by]
    published = build_torchvision("resnet18", seed=5)
    asked = []

    def get_state_dict(self, *args, **kwargs):
        asked.append((self, args, kwargs))
        return published.state_dict()

    monkeypatch.setattr(enum, "get_state_dict", get_state_dict)
    assert_same_state(models.resnet18(weights=weights, progress=False), published)
    assert asked == [(enum.IMAGENET1K_V1, (), {"progress": False, "check_hash": True})]
    for kwargs in ({"num_classes": 10}, {"stem": "cifar"}, {"shortcut": "zero_pad"}):
        (argument,) = kwargs
        with pytest.raises(ValueError, match=f"{argument} is .*expected .* with weights="):
            models.resnet18(weights=weights, **kwargs)


def test_weights_come_from_the_hub_cache(monkeypatch, tmp_path):
    """The file that torchvision would have downloaded, with a name that carries its hash."""
    enum = torchvision.models.ResNet18_Weights
    published = build_torchvision("resnet18", seed=6)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / enum.IMAGENET1K_V1.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(published.state_dict(), cached)
    assert_same_state(models.resnet18(weights="IMAGENET1K_V1"), published)


def test_cifar_stem():
    model = build("resnet18", stem="cifar", num_classes=10)
    assert model.conv1.weight.shape == (64, 3, 3, 3)
    assert model.conv1.stride == (1, 1)
    assert isinstance(model.maxpool, nn.Identity)
    theirs = build_torchvision("resnet18", num_classes=10).state_dict()
    for key, value in model.state_dict().items():
        assert key == "conv1.weight" or torch.equal(value, theirs[key]), key
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_pad_shortcut_has_no_parameters(name):
    model = build(name, shortcut="zero_pad")
    assert not any("downsample" in key for key in model.state_dict())
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


def test_zero_pad_shortcut_subsamples_and_pads():
    x = torch.randn(2, 4, 5, 7)
    y = ZeroPadShortcut(4, 10, 2)(x)
    assert y.shape == (2, 10, 3, 4)
    assert torch.equal(y[:, :4], F.max_pool2d(x, 1, 2))
    assert torch.equal(y[:, 4:], torch.zeros(2, 6, 3, 4))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stem": "cifar100"}, "stem is 'cifar100'; expected 'imagenet' or 'cifar'"),
        ({"shortcut": None}, "shortcut is None; expected 'projection' or 'zero_pad'"),
        ({"num_classes": 0}, "num_classes is 0; expected a positive integer"),
        ({"num_classes": 10.0}, "num_classes is 10.0; expected a positive integer"),
        ({"groups": -1}, "groups is -1; expected a positive integer"),
        ({"groups": 2}, "groups is 2; expected 1"),
        ({"width_per_group": 128}, "width_per_group is 128; expected 64"),
        ({"replace_stride_with_dilation": [True]}, r"replace_stride_with_dilation .*\[True\]"),
    ],
)
def test_a_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        models.resnet18(**kwargs)


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match="pretraned"):
        models.resnet18(pretraned=True)
    with pytest.raises(KeyError, match="IMAGENET22K"):
        models.resnet18(weights="IMAGENET22K")


def twin(name, state, *, fused, **kwargs):
    """A model of fastres with a copy of ``state``, without the time of initialising it."""
    with torch.device("meta"):
        model = getattr(models, name)(fused=fused, **kwargs)
    model.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    return model


def step(model, x, cotangent, *, train):
    """Output, float buffers and gradients of one forward and backward, by name."""
    model.train(train)
    logits = model(x.to(model.fc.weight.dtype))
    # Linear, so that errors of the logits and of the gradients stay apart.
    (logits * cotangent).sum().backward()
    results = {"logits": logits.detach()}
    results |= {key: value for key, value in model.named_buffers() if value.is_floating_point()}
    results |= {key: value.grad for key, value in model.named_parameters()}
    model.zero_grad()
    return {key: value.clone() for key, value in results.items()}


@pytest.fixture(scope="module", params=DEPTHS)
def yardstick(request):
    """For one depth: weights, data, the exact results, and torchvision's own in float32."""
    theirs = well_conditioned(build_torchvision(request.param, num_classes=10))
    torch.manual_seed(1)
    x, cotangent = torch.randn(8, 3, 32, 32), torch.randn(8, 10)
    exact = copy.deepcopy(theirs).double()
    for module in exact.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # one batch sets the running statistics
    with torch.no_grad():
        exact(x.double())
    state = exact.float().state_dict()
    theirs.load_state_dict(state)
    exact = copy.deepcopy(theirs).double()
    results = {}
    for train in (False, True):  # training last: it moves the running statistics
        results[train] = (
            step(exact, x, cotangent, train=train),
            torch_runs(theirs, x, cotangent, train=train),
        )
    return request.param, state, (x, cotangent), results


def torch_runs(model, x, cotangent, *, train):
    """torch's results in float32, five times: its rounding differs by layout and by order."""
    runs = []
    same = torch.arange(len(x))
    for layout, order in (
        (torch.contiguous_format, same),
        (torch.contiguous_format, same.flip(0)),
        (torch.channels_last, same),
        (torch.channels_last, same.flip(0)),
        (torch.channels_last, same.roll(1)),
    ):
        twin = copy.deepcopy(model).to(memory_format=layout)
        result = step(
            twin, x[order].contiguous(memory_format=layout), cotangent[order], train=train
        )
        result["logits"] = result["logits"][order.argsort()]
        runs.append(result)
    return runs


def assert_as_exact_as_torch(ours, runs, exact, key):
    """Relative L2 error at most twice torch's own; of the worst element, luck in torch, 4 times."""
    for error, floor, factor in ((relative_error, 2e-7, 2), (largest_error, 2e-6, 4)):
        theirs = max(error(run[key], exact[key]) for run in runs)
        if theirs > 0.1:  # zero but for rounding: a bias that the next BatchNorm takes out again
            factor = 4
        assert error(ours[key], exact[key]) <= factor * theirs + floor, (key, error.__name__)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_answers_and_gradients_are_as_exact_as_torchvisions(yardstick, fused, train):
    name, state, batch, results = yardstick
    exact, runs = results[train]
    ours = step(twin(name, state, fused=fused, num_classes=10), *batch, train=train)
    assert ours.keys() == exact.keys()
    for key in exact:
        assert_as_exact_as_torch(ours, runs, exact, key)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_224_px_from_the_usual_initialisation(train):
    theirs = build_torchvision("resnet18")
    x, cotangent = torch.randn(2, 3, 224, 224), torch.randn(2, 1000)
    exact = step(copy.deepcopy(theirs).double(), x, cotangent, train=train)
    ours = step(twin("resnet18", theirs.state_dict(), fused=True), x, cotangent, train=train)
    runs = torch_runs(theirs, x, cotangent, train=train)
    gradients = [key for key in exact if key != "logits" and "running" not in key]
    for result in (ours, exact, *runs):
        # ReLUs that switched by chance weigh little in all the gradients together.
        result["gradients"] = torch.cat([result.pop(key).flatten() for key in gradients])
    for key in exact:
        assert_as_exact_as_torch(ours, runs, exact, key)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shortcut", ["projection", "zero_pad"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_fused_equals_plain_with_every_stem_and_shortcut(name, shortcut, train):
    kwargs = {"stem": "cifar", "shortcut": shortcut, "num_classes": 10}
    state = well_conditioned(build(name, **kwargs)).state_dict()
    batch = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.randn(4, 10)
    plain, fused = (
        step(twin(name, state, fused=fused, **kwargs).double(), *batch, train=train)
        for fused in (False, True)
    )
    for key in plain:
        torch.testing.assert_close(fused[key], plain[key], rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"groups": 4, "width_per_group": 8},
        {"replace_stride_with_dilation": [False, True, True]},
        {"norm_layer": lambda channels: nn.GroupNorm(8, channels)},
        {"zero_init_residual": True},
    ],
    ids=["groups", "dilated", "group_norm", "zero_init"],
)
def test_fused_with_torchvisions_keyword_arguments(kwargs):
    state = build("resnet50", num_classes=10, **kwargs).state_dict()
    batch = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.randn(8, 10)
    plain, fused = (
        step(
            twin("resnet50", state, fused=f, num_classes=10, **kwargs).double(), *batch, train=True
        )
        for f in (False, True)
    )
    for key in plain:
        torch.testing.assert_close(fused[key], plain[key], rtol=1e-6, atol=1e-8, msg=key)


def test_fused_has_the_same_parameters_and_modules():
    plain, fused = build("resnet50"), build("resnet50", fused=True)
    assert_same_state(fused, plain)
    modules = [
        (name, type(m)) for name, m in plain.named_modules() if "." in name and not m._modules
    ]
    assert modules == [
        (name, type(m)) for name, m in fused.named_modules() if "." in name and not m._modules
    ]


def test_fused_is_true_or_false():
    with pytest.raises(TypeError, match="fused is 'yes'; expected True or False"):
        models.resnet18(fused="yes")

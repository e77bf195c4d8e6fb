"""The family against torchvision: parameters, state_dict, answers, gradients."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from fastres import models
from fastres.models.resnet import ZeroPadShortcut

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

"""fastres.summary: the known totals, the known sizes, and a model left as it was."""

import pytest
import torch
from torch import nn

from fastres import models

KNOWN = {  # parameters and multiply-adds at 224 px: torchvision's model cards
    "resnet18": (11_689_512, 1_814_073_344),
    "resnet34": (21_797_672, 3_663_761_408),
    "resnet50": (25_557_032, 4_089_184_256),
    "resnet101": (44_549_160, 7_801_405_440),
    "resnet152": (60_192_808, 11_513_626_624),
}


@pytest.mark.parametrize("name", KNOWN)
def test_totals_are_the_known_ones(name):
    with torch.device("meta"):
        model = getattr(models, name)()
    found = models.summary(model, 224, show=False)
    assert (found.params, found.mult_adds) == KNOWN[name]
    assert found.trainable_params == found.params


def test_sizes_halve_from_stage_to_stage():
    found = models.summary(models.resnet18(), (1, 3, 224, 224), show=False)
    sizes = {row.name: row.output_size for row in found.rows}
    names = ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")
    assert [sizes[name][-1] for name in names] == [112, 56, 56, 28, 14, 7, 1]
    assert sizes["fc"] == (1, 1000)


def test_cifar_stem_keeps_the_size():
    found = models.summary(models.resnet18(stem="cifar", num_classes=10), 32, show=False)
    sizes = {row.name: row.output_size for row in found.rows}
    assert [sizes[f"layer{i}"][-1] for i in (1, 2, 3, 4)] == [32, 16, 8, 4]


def test_a_stage_counts_what_is_inside_it():
    found = models.summary(models.resnet18(), 64, show=False)
    top = [row for row in found.rows if row.depth == 1]
    assert sum(row.params for row in top) == found.params
    assert sum(row.mult_adds for row in top) == found.mult_adds


def test_a_batch_costs_its_images():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 4 * 4, 5))
    one = models.summary(model, (1, 3, 6, 6), show=False)
    two = models.summary(model, (2, 3, 6, 6), show=False)
    assert one.mult_adds == 8 * 4 * 4 * 27 + 8 * 4 * 4 * 5
    assert two.mult_adds == 2 * one.mult_adds
    assert models.summary(nn.Conv2d(4, 8, 1, groups=4), (4, 5, 5), show=False).mult_adds == 200


def test_the_model_is_left_as_it_was():
    model = models.resnet18(stem="cifar").train()
    model.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = {name: module.training for name, module in model.named_modules()}
    models.summary(model, 32, show=False)
    assert training == {name: module.training for name, module in model.named_modules()}
    assert all(not module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_it_prints_once_and_returns_the_same(capsys):
    found = models.summary(models.resnet18(), 224)
    assert "11,689,512" in capsys.readouterr().out
    text = str(found)
    assert "1x64x112x112" in text
    assert "1,814,073,344" in text
    assert "layer1" in text
    assert "Conv2d" in text.split("maxpool")[0]
    assert repr(found).count("\n") == 0


def test_depth_limits_the_table_only():
    shallow = models.summary(models.resnet18(), 64, depth=1, show=False)
    assert "BasicBlock" not in str(shallow)
    assert any(row.kind == "BasicBlock" for row in shallow.rows)


@pytest.mark.parametrize("size", [(3, 3), (1, 3, 32, -1), "big", (1, 3, 32.0, 32)])
def test_a_bad_size_is_named(size):
    with pytest.raises(ValueError, match=r"summary: input_size is .*expected"):
        models.summary(models.resnet18(), size, show=False)

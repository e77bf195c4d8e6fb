"""Every op beside torch's spelling of it, eager and compiled."""

from functools import partial

import suites
import torch

from cases import Activation

CONTESTANTS = ("torch eager", "torch.compile", "fastres")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cases(quick):
    if quick:
        convs, activations = suites.QUICK_CONVS, suites.QUICK_ACTIVATIONS
    else:
        convs = (
            suites.find_conv("imagenet-3x3s1-64to64", 16),
            suites.find_conv("imagenet-1x1s1-256to64", 16),
            suites.find_conv("cifar-3x3s1-128to128", 128),
        )
        activations = (Activation("n16-256x56", 16, 256, 56),)
    found = {}
    for conv in convs:
        found[f"conv_bn_add_relu {conv}"] = partial(suites.conv_bn_relu_race, conv, True, DEVICE)
        found[f"conv_stats {conv}"] = partial(suites.conv_stats_race, conv, DEVICE)
        found[f"conv-bn-relu training {conv}"] = partial(suites.conv_training_race, conv, DEVICE)
    for activation in activations:
        found |= dict(suites.activation_races(activation, DEVICE))
    if DEVICE == "cpu":
        found |= dict([suites.max_pool_race(activations[0] if quick else suites.STEM_ACTIVATION)])
    return found


def test_op(contest):
    contest()

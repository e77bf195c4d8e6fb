"""A whole training step: forward, loss, backward, SGD."""

from functools import partial

import suites
import torch
from workloads import QUICK, ModelCase, cifar

CONTESTANTS = ("torch eager", "torch.compile", "fastres")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cases(quick):
    models = [QUICK]
    if not quick:
        models = [cifar("resnet18", 128), ModelCase("resnet50", 224, 8)]
        if DEVICE == "cpu":  # on CUDA they all are
            models += [cifar("resnet18", 128, bf16=True)]
    suite = "gpu-train" if DEVICE == "cuda" else "cpu-train"
    return {str(m): partial(suites.training_race, suite, m, DEVICE) for m in models}


def test_training_step(contest):
    contest()

"""Inference of whole models."""

from functools import partial

import suites
import torch
from workloads import QUICK, ModelCase, cifar

CONTESTANTS = ("torch eager", "torch.compile", "fastres")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cases(quick):
    models = [QUICK]
    if not quick:
        models = [ModelCase(m, 224, n) for m in ("resnet18", "resnet50") for n in (1, 16)]
        models.append(cifar("resnet18", 128))
    suite = "gpu-infer" if DEVICE == "cuda" else "cpu-infer"
    return {str(m): partial(suites.inference_race, suite, m, DEVICE) for m in models}


def test_inference(contest):
    contest()

"""The model of a run, from arguments that a checkpoint can keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastres import _C, models
from fastres.train.config import AmpName, ConfigError


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU if there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N")
    return device


def resolve_amp(name: AmpName, device: torch.device) -> torch.dtype | None:
    """The type to compute in under autocast; None is off.

    "auto" is bfloat16 where the processor multiplies matrices in it: on a GPU, and on a CPU whose
    AMX the kernels may use.
    """
    if name == "auto":
        fast = device.type == "cuda" or _C.cpu_capability() == "amx"
        return torch.bfloat16 if fast else None
    return {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def build_model(name: str, arguments: dict[str, Any]) -> nn.Module:
    """The model `fastres.models.<name>(**arguments)`."""
    model: nn.Module = getattr(models, name)(**arguments)
    return model

"""Fine-tuning: weights to start from, a new head where the classes differ, a frozen body."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torchvision.models import get_model_weights

from fastres.train import checkpoint
from fastres.train.config import ConfigError
from fastres.train.errors import CheckpointError

HEAD = "fc."  # what the last layer's parameters are called
MAX_NAMED = 3  # keys that an error names


def torchvision_weights(name: str, source: str) -> Any | None:
    """torchvision's weights called `source` of the model called `name`, not loaded, or None."""
    weights = get_model_weights(name)
    return weights.__members__.get(source.removeprefix(f"{weights.__name__}."))


def load_weights(model: nn.Module, name: str, source: str, classes: Sequence[str]) -> bool:
    """Put weights into `model`, but for the head if it was made for other classes.

    Args:
        model: a model of the family, on any device.
        name: what it is called in `fastres.models`.
        source: the name of torchvision's weights, such as IMAGENET1K_V1 (downloaded by torchvision
            into its cache), or the path of a checkpoint of fastres or of a state_dict.
        classes: what the model's outputs are. The head is kept if there are as many of them in
            the weights, and, where these know their classes, they are the same.

    Returns:
        Whether the head was loaded too.

    Raises:
        ConfigError: `source` is neither.
        CheckpointError: the weights cannot be downloaded or read, or they do not fit the model.
    """
    published = torchvision_weights(name, source)
    if published is not None:
        state, known = _download(published), None
    elif Path(source).exists():
        state, known = _read(Path(source), name)
    else:
        names = ", ".join(get_model_weights(name).__members__)
        raise ConfigError(
            f"weights is {source!r}, expected a file or one of torchvision's for {name}: {names}"
        )
    own = model.state_dict()
    head = [key for key in own if key.startswith(HEAD)]
    same_head = all(key in state and state[key].shape == own[key].shape for key in head)
    same_head &= known is None or list(known) == list(classes)
    if not same_head:
        state = {key: value for key, value in state.items() if not key.startswith(HEAD)}
        own = {key: value for key, value in own.items() if not key.startswith(HEAD)}
    _refuse_misfits(source, name, own, state)
    model.load_state_dict(state, strict=False)
    return same_head


def _download(published: Any) -> dict[str, Tensor]:
    bar = sys.stderr.isatty()  # a log keeps every state of a bar
    try:
        state: dict[str, Tensor] = published.get_state_dict(
            progress=bar, check_hash=True, weights_only=True
        )
        return state
    except Exception as error:  # urllib, torch.hub and torch.load each have their own
        raise CheckpointError(
            f"torchvision's {published.name} cannot be had from {published.url}: {error}; "
            "download it elsewhere and give --weights FILE"
        ) from error


def _read(path: Path, name: str) -> tuple[dict[str, Tensor], list[str] | None]:
    """The state_dict in a file, and the classes where the file knows them."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have errors of their own for damage
        reason = checkpoint.why_unreadable(error)
        raise CheckpointError(f"{path} is damaged or holds no weights: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a state_dict")
    if content.get("model_name", name) != name:
        raise CheckpointError(f"{path} is a {content['model_name']}, expected a {name}")
    # Training scripts wrap the state_dict in a dictionary with the rest of their state.
    state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
        raise CheckpointError(f"{path} holds no state_dict: expected names and tensors")
    state = dict(state)
    consume_prefix_in_state_dict_if_present(state, "module.")  # of DistributedDataParallel
    return state, content.get("classes")


def _refuse_misfits(
    source: str, name: str, own: dict[str, Tensor], state: dict[str, Tensor]
) -> None:
    counters = ".num_batches_tracked"  # older files lack them, and nothing is computed from them
    faults = {
        "it lacks": [key for key in own if key not in state and not key.endswith(counters)],
        "it has besides": [key for key in state if key not in own],
        "of other shapes are": [
            f"{key} {tuple(state[key].shape)}, expected {tuple(value.shape)}"
            for key, value in own.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    if not any(faults.values()):
        return
    told = []
    for what, keys in faults.items():
        if keys:
            more = f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else ""
            told.append(f"{what} {'; '.join(keys[:MAX_NAMED])}{more}")
    hint = ""
    if "conv1.weight" in state and state["conv1.weight"].shape != own["conv1.weight"].shape:
        hint = " (its stem is another one: see --stem)"
    raise CheckpointError(f"{source} does not fit {name}{hint}: {', '.join(told)}")


def freeze_body(model: nn.Module) -> None:
    """Take every parameter but the head's out of training.

    The BatchNorms' statistics stay as they are too: see `keep_frozen_statistics`.
    """
    for key, parameter in model.named_parameters():
        if not key.startswith(HEAD):
            parameter.requires_grad_(False)


def keep_frozen_statistics(model: nn.Module) -> None:
    """Put into evaluation mode each BatchNorm that has parameters, none of them trained.

    Otherwise its running statistics would drift away from what its frozen neighbours were trained
    with, and a frozen body would not compute what it did before.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            parameters = list(module.parameters(recurse=False))
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()

"""The recipes: named, versioned settings, from which a run's own are made by overriding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastres.train.config import ConfigError, RecipeName, TrainConfig

# What a well-tuned plain ResNet-18 wants of CIFAR-10, where each part comes from stands at its
# setting. The learning rate is 0.1 for 128 images, times the batch size (Goyal et al. 2017); the
# schedule's shape, the small held-out part and no weight decay on BatchNorm follow Page 2018, "How
# to Train Your ResNet". The rate's last steps are the best, so patience outlasts every epoch.
_BEST = TrainConfig(
    recipe="best",
    recipe_version=1,
    epochs=40,
    batch_size=512,
    lr=0.4,
    schedule="one-cycle",
    warmup=0.2,
    nesterov=True,
    decay_norm=False,
    label_smoothing=0.1,
    cutout=8,
    ema=0.998,
    valid_ratio=0.02,
    patience=1000,
    amp="auto",
)
RECIPES: dict[RecipeName, TrainConfig] = {
    "standard": TrainConfig(),
    "best": _BEST,
    # Smaller batches, for more steps an epoch, and a higher rate for an image, which regularises
    # (Smith and Topin 2019); an average over half an epoch; flips that show each image both ways in
    # every two epochs (Jordan 2024).
    "best-short": replace(
        _BEST,
        recipe="best-short",
        recipe_version=4,
        epochs=36,
        batch_size=128,
        lr=0.25,
        flip="alternating",
        ema=0.995,
    ),
}


def recipe(name: RecipeName, **settings: Any) -> TrainConfig:
    """The recipe called `name`, with other values for the `settings` given.

    Raises:
        ConfigError: there is no such recipe, or a setting is unknown or has a value that cannot be.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe is {name!r}, expected {' or '.join(RECIPES)}")
    try:
        return replace(RECIPES[name], **settings)
    except TypeError as error:
        raise ConfigError(f"recipe {name}: {error}") from error

"""Training: recipes as values of `TrainConfig`, run by `fit`."""

from fastres.train.config import ConfigError, EvalConfig, PredictConfig, TrainConfig
from fastres.train.errors import (
    CheckpointError,
    ImageError,
    NonFiniteLossError,
    PeerError,
    RunFolderError,
    RunInterruptedError,
    TrainError,
    WriteError,
)
from fastres.train.inference import Prediction, evaluate_checkpoint, load_model, predict
from fastres.train.loop import Result, evaluate, fit, train_one_epoch
from fastres.train.meter import Meter
from fastres.train.outcomes import ClassAccuracy, Outcomes
from fastres.train.recipes import RECIPES, recipe

__all__ = [
    "RECIPES",
    "CheckpointError",
    "ClassAccuracy",
    "ConfigError",
    "EvalConfig",
    "ImageError",
    "Meter",
    "NonFiniteLossError",
    "Outcomes",
    "PeerError",
    "PredictConfig",
    "Prediction",
    "Result",
    "RunFolderError",
    "RunInterruptedError",
    "TrainConfig",
    "TrainError",
    "WriteError",
    "evaluate",
    "evaluate_checkpoint",
    "fit",
    "load_model",
    "predict",
    "recipe",
    "train_one_epoch",
]

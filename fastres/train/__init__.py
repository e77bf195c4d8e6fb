"""Training: the standard recipe, said once in `TrainConfig` and run by `fit`."""

from fastres.train.config import ConfigError, EvalConfig, PredictConfig, TrainConfig
from fastres.train.errors import (
    CheckpointError,
    ImageError,
    NonFiniteLossError,
    RunFolderError,
    RunInterruptedError,
    TrainError,
)
from fastres.train.inference import Prediction, evaluate_checkpoint, load_model, predict
from fastres.train.loop import Meter, Result, evaluate, fit, train_one_epoch

__all__ = [
    "CheckpointError",
    "ConfigError",
    "EvalConfig",
    "ImageError",
    "Meter",
    "NonFiniteLossError",
    "PredictConfig",
    "Prediction",
    "Result",
    "RunFolderError",
    "RunInterruptedError",
    "TrainConfig",
    "TrainError",
    "evaluate",
    "evaluate_checkpoint",
    "fit",
    "load_model",
    "predict",
    "train_one_epoch",
]

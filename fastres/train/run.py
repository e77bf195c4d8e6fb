"""The state of a run, and its way into checkpoints and back."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastres.data import Dataset, PictureFolder
from fastres.data.datasets import FOLDER
from fastres.data.folder import resize_size
from fastres.train import checkpoint
from fastres.train.config import TrainConfig, differences, from_dict, to_dict
from fastres.train.early_stopping import EarlyStopping
from fastres.train.ema import MovingAverage
from fastres.train.errors import CheckpointError, RunFolderError
from fastres.train.meter import Meter
from fastres.train.model import build_model
from fastres.train.optim import make_optimizer, make_scheduler
from fastres.train.parts import image_size, split_content, stem_for
from fastres.train.run_folder import RunFolder
from fastres.train.seed import random_state, set_random_state
from fastres.train.weights import freeze_body, load_weights
from fastres.version import __version__

# `model` is what predicts; with averaging the weights in training stand under `averaging`.
MODEL_KEYS = frozenset({
    "model", "model_name", "model_arguments", "classes", "mean", "std", "data", "image_size",
    "resize_size", "split",
})  # fmt: skip
RUN_KEYS = MODEL_KEYS | {
    "averaging", "config", "optimizer", "scheduler", "scaler", "early_stopping", "epoch", "meter",
    "history", "random",
}  # fmt: skip


class Run:
    """All that changes while a run goes on, and so all that its checkpoint holds."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset | PictureFolder,
        device: torch.device,
        steps_per_epoch: int,
    ) -> None:
        self.config = config
        self.image_size = image_size(dataset, config)
        self.model_name = config.model
        self.model_arguments = {
            "stem": stem_for(self.image_size, config),
            "num_classes": len(dataset.classes),
        }
        self.dataset = dataset
        self.data = config.data
        if isinstance(dataset, PictureFolder):
            self.data = f"{FOLDER}{dataset.path}"  # from wherever the checkpoint is used
        self.split = split_content(dataset, config)
        model = build_model(config.model, {**self.model_arguments, "fused": config.fused})
        if config.weights is not None and not _has_checkpoint(config):
            load_weights(model, config.model, config.weights, dataset.classes)
        if config.freeze:
            freeze_body(model)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device).to(memory_format=layout)
        self.average = MovingAverage(self.model, config.ema) if config.ema else None
        self.optimizer = make_optimizer(config, self.model)
        self.scheduler = make_scheduler(config, self.optimizer, steps_per_epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.stopping = EarlyStopping(config.patience)
        self.epoch = 0
        self.meter = Meter()
        self.history: list[dict[str, Any]] = []

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and kept: the weights' average where there is one."""
        return self.average.module if self.average else self.model

    def after_step(self) -> None:
        """What follows every step of the optimizer: the schedule's, and the average's."""
        with warnings.catch_warnings():
            # float16's scaler leaves out a first step whose gradients are infinite.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        if self.average:
            self.average.update(self.model)

    def _model_content(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "model_name": self.model_name,
            "model_arguments": self.model_arguments,
            "data": self.data,
            "classes": list(self.dataset.classes),
            "mean": list(self.dataset.mean),
            "std": list(self.dataset.std),
            "image_size": self.image_size,
            "resize_size": resize_size(self.image_size),
            "split": self.split,
            "epoch": self.epoch,
            "model": self.evaluated.state_dict(),
        }

    def save_best(self, path: Path) -> None:
        """What evaluation and prediction need."""
        checkpoint.save(path, self._model_content())

    def save_last(self, path: Path) -> None:
        """What going on needs: `epoch` epochs are done, and `meter.step` steps of the next one."""
        self.meter.read()
        content = {
            **self._model_content(),
            "averaging": self.average
            and {"trained": self.model.state_dict(), "steps": self.average.steps},
            "config": to_dict(self.config),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "early_stopping": asdict(self.stopping),
            "meter": self.meter.state_dict(),
            "history": self.history,
            "random": random_state(),
        }
        checkpoint.save(path, content)

    def load_last(self, path: Path) -> str | None:
        """Put back what `save_last` wrote, or if that is damaged what it wrote before.

        Returns:
            In the latter case what is wrong, for people.
        """
        content, damage = checkpoint.load_or_previous(path, RUN_KEYS)
        refuse_other_settings(path, from_dict(content["config"]), self.config)
        if content["split"]["fingerprint"] != self.split["fingerprint"]:
            raise RunFolderError(
                f"cannot resume {path}: {self.split['path']} has other pictures than "
                f"{content['split']['path']} had when the run began"
            )
        try:
            self.evaluated.load_state_dict(content["model"])
            if self.average:
                self.model.load_state_dict(content["averaging"]["trained"])
                self.average.steps = content["averaging"]["steps"]
            self.optimizer.load_state_dict(content["optimizer"])
            self.scheduler.load_state_dict(content["scheduler"])
            self.scaler.load_state_dict(content["scaler"])
            self.stopping = EarlyStopping(**content["early_stopping"])
            self.epoch = content["epoch"]
            self.meter = Meter(**content["meter"])
            self.history = content["history"]
            set_random_state(content["random"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} does not fit this run: {error}") from error
        if damage:  # or the next save would keep the damaged file in the place of the good one
            os.replace(checkpoint.previous(path), path)
        return damage

    def find_best(self, path: Path) -> None:
        """See to it that the best epoch's checkpoint is at `path`, be it the one before.

        It is that one where the run goes on from before the latest best epoch.
        """
        if self.stopping.best_epoch == 0:
            return
        try:
            self._read_best(path)
        except CheckpointError as first:
            former = checkpoint.previous(path)
            if not former.exists():
                raise
            try:
                self._read_best(former)
            except CheckpointError as second:
                raise CheckpointError(f"neither can be used: {first}; {second}") from first
            os.replace(former, path)

    def load_best(self, path: Path) -> None:
        """Put the best epoch's weights into the model that is evaluated."""
        self.evaluated.load_state_dict(self._read_best(path)["model"])

    def _read_best(self, path: Path) -> dict[str, Any]:
        content = checkpoint.load(path, MODEL_KEYS)
        if content["epoch"] != self.stopping.best_epoch:
            raise CheckpointError(
                f"{path} is of epoch {content['epoch']}, but the run's best epoch is "
                f"{self.stopping.best_epoch}: it is not this run's"
            )
        return content


def _has_checkpoint(config: TrainConfig) -> bool:
    """Whether the run goes on from a checkpoint, which holds everything that it began with."""
    return config.resume and config.out is not None and RunFolder(config.out).has_checkpoint


def refuse_other_settings(path: Path, old: TrainConfig, new: TrainConfig) -> None:
    if changed := differences(old, new):
        raise RunFolderError(
            f"cannot resume {path} with other settings: {', '.join(changed)}; "
            "leave them out to take the run's own"
        )

"""The training loop, in three functions that can be taken apart: an epoch, an evaluation, a run."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.data import (
    Batches,
    DataError,
    Dataset,
    PictureBatches,
    PictureFolder,
    PictureSet,
    load,
)
from fastres.data.folder import resize_size
from fastres.train import checkpoint
from fastres.train.config import TrainConfig, differences, from_dict, to_dict
from fastres.train.curves import draw_curves
from fastres.train.early_stopping import EarlyStopping
from fastres.train.errors import (
    CheckpointError,
    NonFiniteLossError,
    RunFolderError,
    RunInterruptedError,
)
from fastres.train.files import write_json
from fastres.train.model import build_model, resolve_device
from fastres.train.parts import (
    Part,
    check_pictures,
    divide,
    image_size,
    split_content,
    stem_for,
    worker_count,
)
from fastres.train.report import Report
from fastres.train.run_folder import RunFolder
from fastres.train.seed import random_state, seed_everything, set_random_state
from fastres.train.weights import freeze_body, keep_frozen_statistics, load_weights
from fastres.version import __version__

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MODEL_KEYS = frozenset({
    "model", "model_name", "model_arguments", "classes", "mean", "std", "data", "image_size",
    "resize_size", "split",
})  # fmt: skip
RUN_KEYS = MODEL_KEYS | {
    "config", "optimizer", "scheduler", "scaler", "early_stopping", "epoch", "meter", "history",
    "random",
}  # fmt: skip
# A GPU is asked for its losses only so often: each question waits for all work in flight.
STEPS_BETWEEN_READS = {"cpu": 1, "cuda": 20}


@dataclass
class Meter:
    """Loss and accuracy over the images seen so far, and how long that took.

    Raises:
        NonFiniteLossError: from `add` or `read`, naming the step, when a loss is NaN or infinite.
    """

    step: int = 0
    images: int = 0
    loss: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    pending: list[tuple[Tensor, Tensor, int]] = field(default_factory=list, repr=False)
    since: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def mean_loss(self) -> float:
        """Mean over the images that have been read."""
        return self.loss / max(self.images, 1)

    @property
    def accuracy(self) -> float:
        """Share of the images that have been read whose class is right."""
        return self.correct / max(self.images, 1)

    @property
    def images_per_second(self) -> float:
        """Images over time, both up to the last read."""
        return self.images / max(self.seconds, 1e-9)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: its mean loss (), logits (N, classes) and labels (N,)."""
        correct = (logits.detach().argmax(1) == labels).sum()
        self.pending.append((loss.detach(), correct, len(labels)))
        if len(self.pending) >= STEPS_BETWEEN_READS.get(loss.device.type, 1):
            self.read()

    def read(self) -> None:
        """Fetch what is still on the device."""
        for loss, correct, n in self.pending:
            self.step += 1
            value = loss.item()
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss is {value} at step {self.step}: try a lower lr, or amp none"
                )
            self.loss += value * n
            self.correct += int(correct.item())
            self.images += n
        self.pending.clear()
        now = time.perf_counter()
        self.seconds += now - self.since
        self.since = now

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain numbers."""
        names = ("step", "images", "loss", "correct", "seconds")
        return {name: getattr(self, name) for name in names}


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    amp: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    meter: Meter | None = None,
    on_step: Callable[[Meter], None] | None = None,
) -> Meter:
    """One optimizer step of cross-entropy a batch, with the model in training mode.

    A BatchNorm none of whose parameters is trained keeps its running statistics and uses them.

    Args:
        model: logits (N, classes) of images (N, C, H, W).
        batches: pairs of images and labels (N,) int64, on the model's device.
        optimizer: of the model's parameters.
        amp: compute type under autocast; None is off.
        scaler: scales the loss, wanted with float16.
        meter: goes on counting in it, for an epoch begun before.
        on_step: called after every step; an exception from it leaves the model between two steps.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
    """
    meter = meter or Meter()
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    meter.since = time.perf_counter()
    model.train()
    keep_frozen_statistics(model)
    for images, labels in batches:
        with torch.autocast(images.device.type, amp, enabled=amp is not None):
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        meter.add(loss, logits, labels)
        if on_step:
            on_step(meter)
    meter.read()
    return meter


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    amp: torch.dtype | None = None,
    on_step: Callable[[Meter], None] | None = None,
) -> Meter:
    """Cross-entropy and accuracy over `batches`, with the model in evaluation mode.

    Raises:
        NonFiniteLossError: the loss is NaN or infinite.
    """
    meter = Meter()
    model.eval()
    for images, labels in batches:
        with torch.autocast(images.device.type, amp, enabled=amp is not None):
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        meter.add(loss, logits, labels)
        if on_step:
            on_step(meter)
    meter.read()
    return meter


@dataclass(frozen=True)
class Result:
    """What a run came to; the accuracies are shares in [0, 1], those of the best epoch."""

    folder: Path
    best_checkpoint: Path
    epochs: int
    ended_by: str
    best_epoch: int
    valid_loss: float
    valid_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float
    history: list[dict[str, Any]]


class _Run:
    """All that changes while a run goes on, and so all that its checkpoint holds."""

    def __init__(
        self, config: TrainConfig, dataset: Dataset | PictureFolder, device: torch.device
    ) -> None:
        self.config = config
        self.image_size = image_size(dataset, config)
        self.model_name = config.model
        self.model_arguments = {
            "stem": stem_for(self.image_size, config),
            "num_classes": len(dataset.classes),
        }
        self.dataset = dataset
        self.split = split_content(dataset, config)
        model = build_model(config.model, {**self.model_arguments, "fused": config.fused})
        if config.weights is not None and not _has_checkpoint(config):
            load_weights(model, config.model, config.weights, dataset.classes, progress=True)
        if config.freeze:
            freeze_body(model)
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(
            self.optimizer, config.step_size, config.gamma
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.stopping = EarlyStopping(config.patience)
        self.epoch = 0
        self.meter = Meter()
        self.history: list[dict[str, Any]] = []

    def _model_content(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "model_name": self.model_name,
            "model_arguments": self.model_arguments,
            "data": self.config.data,
            "classes": list(self.dataset.classes),
            "mean": list(self.dataset.mean),
            "std": list(self.dataset.std),
            "image_size": self.image_size,
            "resize_size": resize_size(self.image_size),
            "split": self.split,
            "epoch": self.epoch,
            "model": self.model.state_dict(),
        }

    def save_best(self, path: Path) -> None:
        """What evaluation and prediction need."""
        checkpoint.save(path, self._model_content())

    def save_last(self, path: Path) -> None:
        """What going on needs: `epoch` epochs are done, and `meter.step` steps of the next one."""
        self.meter.read()
        content = {
            **self._model_content(),
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

    def load_last(self, path: Path) -> None:
        content = checkpoint.load(path, RUN_KEYS)
        _refuse_other_settings(path, from_dict(content["config"]), self.config)
        if content["split"]["fingerprint"] != self.split["fingerprint"]:
            raise RunFolderError(
                f"cannot resume {path}: {self.split['path']} has other pictures than "
                f"{content['split']['path']} had when the run began"
            )
        try:
            self.model.load_state_dict(content["model"])
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

    def load_best(self, path: Path) -> None:
        content = checkpoint.load(path, MODEL_KEYS)
        if content["epoch"] != self.stopping.best_epoch:
            raise CheckpointError(
                f"{path} is of epoch {content['epoch']}, but the run's best epoch is "
                f"{self.stopping.best_epoch}: it is not this run's"
            )
        self.model.load_state_dict(content["model"])


def _has_checkpoint(config: TrainConfig) -> bool:
    """Whether the run goes on from a checkpoint, which holds everything that it began with."""
    return config.resume and config.out is not None and RunFolder(config.out).last.exists()


def _refuse_other_settings(path: Path, old: TrainConfig, new: TrainConfig) -> None:
    if changed := differences(old, new):
        raise RunFolderError(
            f"cannot resume {path} with other settings: {', '.join(changed)}; "
            "leave them out to take the run's own"
        )


class _StopSignal:
    """Whether SIGINT or SIGTERM came."""

    requested = False


@contextmanager
def _stop_on_signal() -> Iterator[_StopSignal]:
    """Turn the first SIGINT or SIGTERM into a request; a second one acts as without this."""
    stop = _StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        for each, handler in former.items():
            signal.signal(each, handler)

    for number in former:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def fit(config: TrainConfig, *, progress: bool = True) -> Result:
    """Run the standard recipe and leave everything in the run's folder.

    Sets torch's global seeds and has cuDNN keep to deterministic algorithms (see
    `fastres.train.seed`). The same config gives the same numbers on the same machine, and on the
    CPU a run that was killed and resumed has the same weights, bit for bit, as one that was not.

    Args:
        config: the settings; `config.resume` goes on with the run in `config.out`.
        progress: show a bar, a line an epoch and a table at the end.

    Raises:
        ConfigError, DataError: the settings or the data cannot be used.
        RunFolderError: the folder is not empty, or has no run to resume, or one of other settings.
        CheckpointError: a checkpoint to go on from is damaged.
        NonFiniteLossError: the loss became NaN or infinite; the last good checkpoint stays.
        RunInterruptedError: SIGINT or SIGTERM came; the state is saved.
    """
    device = resolve_device(config.device)
    dataset = load(config.data, config.root)
    size, workers = image_size(dataset, config), worker_count(config.workers)
    parts = divide(dataset, config)
    if not config.resume:  # a run that goes on was checked when it began
        check_pictures(parts, size, workers, progress=progress)

    def batches(part: Part, **options: Any) -> Batches | PictureBatches:
        common = (config.batch_size, dataset.mean, dataset.std)
        if isinstance(part, PictureSet):
            options |= {"image_size": size, "resize_size": resize_size(size), "workers": workers}
            return PictureBatches(part, *common, device=device, **options)
        return Batches(part.to(device), *common, **options)

    train = batches(parts[0], augment=True, seed=config.seed)
    valid = batches(parts[1])
    test = batches(parts[2])

    seed_everything(config.seed)
    run = _Run(config, dataset, device)
    folder = _open_folder(config, run)
    amp = AMP_DTYPES[config.amp]
    report = Report(config.epochs, len(train), enabled=progress)
    with report, _stop_on_signal() as stop:
        report.start(
            f"{config.model} on {config.data}: {len(train.part):,} training, "
            f"{len(valid.part):,} validation, {len(test.part):,} test images; {device}; "
            f"{folder.path}"
        )

        def leave_if_asked(meter: Meter) -> None:
            if stop.requested:
                run.save_last(folder.last)
                raise RunInterruptedError(folder.path)

        def after_step(meter: Meter) -> None:
            report.training_step(meter)
            leave_if_asked(meter)

        while run.epoch < config.epochs and not run.stopping.should_stop:
            report.begin_epoch(run.epoch, run.meter.step)
            train.set_epoch(run.epoch)
            try:
                train_one_epoch(
                    run.model,
                    train.iterate(run.meter.step),
                    run.optimizer,
                    amp=amp,
                    scaler=run.scaler,
                    meter=run.meter,
                    on_step=after_step,
                )
                validation = evaluate(run.model, valid, amp=amp, on_step=leave_if_asked)
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"epoch {run.epoch + 1}: {error}") from error
            except DataError:  # a picture went missing: between two steps, so nothing is lost
                run.save_last(folder.last)
                raise
            _end_epoch(run, validation, folder, report)

        run.load_best(folder.best)

        def leave_without_saving(meter: Meter) -> None:
            if stop.requested:  # the model is the best one by now, and last.pt is complete
                raise RunInterruptedError(folder.path)

        tested = evaluate(run.model, test, amp=amp, on_step=leave_without_saving)
        result = _result(run, tested, folder)
        write_json(folder.result, {**asdict(result), **_paths_as_text(result)})
        report.end(result)
    return result


def _open_folder(config: TrainConfig, run: _Run) -> RunFolder:
    """A new folder, or the old one with its state put into `run`."""
    if not config.resume:
        return RunFolder.create(config)
    assert config.out is not None  # TrainConfig refuses resume without out
    folder = RunFolder.existing(config.out)
    if folder.last.exists():
        run.load_last(folder.last)
        folder.write_metrics(run.history)
    else:  # killed before its first checkpoint: the run begins again
        _refuse_other_settings(folder.config, folder.read_config(), config)
    return folder


def _end_epoch(run: _Run, validation: Meter, folder: RunFolder, report: Report) -> None:
    line = {
        "epoch": run.epoch + 1,
        "train_loss": run.meter.mean_loss,
        "train_accuracy": run.meter.accuracy,
        "valid_loss": validation.mean_loss,
        "valid_accuracy": validation.accuracy,
        "lr": run.optimizer.param_groups[0]["lr"],
        "images_per_second": run.meter.images_per_second,
        "seconds": run.meter.seconds + validation.seconds,
    }
    with warnings.catch_warnings():
        # Resumed after an epoch's last step, the optimizer has not stepped in this process yet.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        run.scheduler.step()
    run.history.append(line)
    run.epoch += 1
    run.meter = Meter()
    best = run.stopping.update(run.epoch, validation.accuracy)
    # The best before the last: killed between the two, the epoch is run again and both are right.
    if best:
        run.save_best(folder.best)
    run.save_last(folder.last)
    folder.write_metrics(run.history)
    draw_curves(folder.curves, run.history, run.stopping.best_epoch)
    report.end_epoch(line, best=best)


def _result(run: _Run, tested: Meter, folder: RunFolder) -> Result:
    best = run.history[run.stopping.best_epoch - 1]
    stopped = run.stopping.should_stop
    return Result(
        folder=folder.path,
        best_checkpoint=folder.best,
        epochs=run.epoch,
        ended_by="early stopping" if stopped else "all done",
        best_epoch=run.stopping.best_epoch,
        valid_loss=best["valid_loss"],
        valid_accuracy=best["valid_accuracy"],
        test_loss=tested.mean_loss,
        test_accuracy=tested.accuracy,
        seconds=sum(line["seconds"] for line in run.history),
        history=run.history,
    )


def _paths_as_text(result: Result) -> dict[str, str]:
    return {"folder": str(result.folder), "best_checkpoint": str(result.best_checkpoint)}

"""The training loop, in three functions that can be taken apart: an epoch, an evaluation, a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.data import Batches, DataError, PictureBatches, PictureSet, load
from fastres.data.folder import resize_size
from fastres.train.config import ConfigError, TrainConfig
from fastres.train.curves import draw_curves
from fastres.train.distributed import Processes, connect
from fastres.train.errors import NonFiniteLossError, RunInterruptedError
from fastres.train.files import write_json
from fastres.train.meter import Meter
from fastres.train.mistakes import write_mistakes
from fastres.train.model import resolve_amp
from fastres.train.outcomes import Outcomes
from fastres.train.parts import Part, check_pictures, divide, image_size, worker_count
from fastres.train.report import Report
from fastres.train.run import Run, refuse_other_settings
from fastres.train.run_folder import RunFolder
from fastres.train.seed import seed_everything
from fastres.train.signals import stop_on_signal
from fastres.train.tensorboard import TensorBoard, require_tensorboard
from fastres.train.weights import keep_frozen_statistics


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    loss_function: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    amp: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    meter: Meter | None = None,
    on_step: Callable[[Meter], None] | None = None,
) -> Meter:
    """One optimizer step a batch, with the model in training mode.

    A BatchNorm none of whose parameters is trained keeps its running statistics and uses them.

    Args:
        model: logits (N, classes) of images (N, C, H, W).
        batches: pairs of images and labels (N,) int64, on the model's device.
        optimizer: of the model's parameters.
        loss_function: the mean loss () of logits (N, classes) and labels (N,).
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
            loss = loss_function(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        meter.lr = optimizer.param_groups[0]["lr"]
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
    on_batch: Callable[[Tensor, Tensor], None] | None = None,
) -> Meter:
    """Cross-entropy and accuracy over `batches`, with the model in evaluation mode.

    `on_batch` is given the logits (N, classes) and labels (N,) of each batch.

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
        if on_batch:
            on_batch(logits, labels)
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


def fit(config: TrainConfig, *, progress: bool = True) -> Result:
    """Run a recipe and leave everything in the run's folder.

    Sets torch's global seeds and has cuDNN keep to deterministic algorithms (see
    `fastres.train.seed`). The same config gives the same numbers on the same machine, and on the
    CPU a run that was killed and resumed has the same weights, bit for bit, as one that was not.

    Where torchrun started several processes on this machine, they share every batch and take one
    step together; the first of them writes. A signal to one of them, or a picture that it cannot
    read, stops all, and the state is saved.

    Args:
        config: the settings; `config.resume` goes on with the run in `config.out`.
        progress: show a bar, a line an epoch and a table at the end.

    Raises:
        ConfigError, DataError: the settings or the data cannot be used; in the middle of a run the
            state is saved.
        RunFolderError: the folder is not empty, or has no run to resume, or one of other settings.
        CheckpointError: the checkpoint to go on from is damaged, and so is the one before it.
        WriteError: a file cannot be written, as on a full disk; what was written before stays.
        NonFiniteLossError: the loss became NaN or infinite; the last good checkpoint stays.
        RunInterruptedError: SIGINT or SIGTERM came; the state is saved.
        PeerError: another process has ended the run.
    """
    with connect(config.device) as (processes, device):
        return _fit(config, processes, device, progress=progress and processes.first)


def _fit(
    config: TrainConfig, processes: Processes, device: torch.device, *, progress: bool
) -> Result:
    if config.tensorboard:
        require_tensorboard()
    if processes.size > 1 and config.sync_bn and device.type == "cpu" and not config.fused:
        raise ConfigError("sync_bn is True, expected fused beside it: torch has it on GPUs alone")
    dataset = processes.first_before_others(lambda: load(config.data, config.root))
    size, workers = image_size(dataset, config), worker_count(config.workers)
    parts = divide(dataset, config)
    if not config.resume:  # a run that goes on was checked when it began
        processes.from_first(lambda: check_pictures(parts, size, workers, progress=progress))

    def batches(part: Part, **options: Any) -> Batches | PictureBatches:
        common = (config.batch_size, dataset.mean, dataset.std)
        options["channels_last"] = config.channels_last
        if isinstance(part, PictureSet):
            options |= {"image_size": size, "resize_size": resize_size(size), "workers": workers}
            return PictureBatches(part, *common, device=device, **options)
        return Batches(part.to(device), *common, **options)

    share = (processes.rank, processes.size)
    augmentation = {"augment": True, "flip": config.flip, "cutout": config.cutout}
    train = batches(parts[0], **augmentation, seed=config.seed, share=share)
    valid = batches(parts[1], share=share)
    test = batches(parts[2])
    if (rest := (len(train.part) - 1) % config.batch_size + 1) < processes.size:
        raise ConfigError(
            f"batch_size is {config.batch_size}, which leaves {rest} of {len(train.part)} images "
            f"to the last batch, expected one for each of the {processes.size} processes"
        )

    seed_everything(config.seed)
    run = Run(config, dataset, device, len(train))
    report = Report(config.epochs, len(train), enabled=progress)
    folder = processes.from_first(lambda: _open_folder(config, run, report))
    if not processes.first and config.resume and folder.has_checkpoint:
        run.load_last(folder.last)
        run.meter.forget_counts()
    trained = processes.wrap(run.model, sync_bn=config.sync_bn)
    amp = resolve_amp(config.amp, device)
    loss_function = processes.weigh(
        partial(F.cross_entropy, label_smoothing=config.label_smoothing)
    )
    board = TensorBoard(
        folder.tensorboard, run.epoch, enabled=config.tensorboard and processes.first
    )
    place = f"{processes.size} x {device.type}" if processes.size > 1 else str(device)
    with report, stop_on_signal() as stop:
        report.start(
            f"{config.model} on {config.data}, recipe {config.recipe}: "
            f"{len(train.part):,} training, {len(valid.part):,} validation, "
            f"{len(test.part):,} test images; "
            f"{place}; {folder.path}"
        )

        def leave_if(asked: bool, fault: DataError | None = None) -> None:
            """Save and end, all processes together, if one of them is asked to or has a fault."""
            if processes.any(asked or fault is not None):
                processes.sum(run.meter)
                if processes.first:
                    run.save_last(folder.last)
                raise fault or RunInterruptedError(folder.path)

        def agreed(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
            """`batches`; all processes have theirs, or none goes on to a step with the others."""
            while True:
                asked, batch, fault = stop.requested, None, None
                try:
                    batch = None if asked else next(batches, None)
                except DataError as error:  # a picture went missing
                    fault = error
                if batch is None:
                    run.meter.read()  # a NaN is found before the others hear that all is well
                leave_if(asked, fault)
                if batch is None:
                    return
                yield batch

        def after_step(meter: Meter) -> None:
            run.after_step()
            report.training_step(meter)

        def validate() -> Meter:
            # Several processes may have different numbers of steps here, so none can be asked.
            alone = processes.size == 1
            on_step = (lambda meter: leave_if(stop.requested)) if alone else None
            fault, meter = None, Meter()
            try:
                meter = evaluate(run.evaluated, valid, amp=amp, on_step=on_step)
            except DataError as error:
                fault = error
            leave_if(stop.requested, fault)
            return meter

        while run.epoch < config.epochs and not run.stopping.should_stop:
            report.begin_epoch(run.epoch, run.meter.step)
            train.set_epoch(run.epoch)
            try:
                train_one_epoch(
                    trained,
                    agreed(train.iterate(run.meter.step)),
                    run.optimizer,
                    loss_function=loss_function,
                    amp=amp,
                    scaler=run.scaler,
                    meter=run.meter,
                    on_step=after_step,
                )
                processes.take_statistics_of_first(run.evaluated)
                validation = validate()
            except NonFiniteLossError as error:
                processes.fail()
                kept = run.stopping.best_epoch
                best = f"; {folder.best} keeps epoch {kept}, the best so far" if kept else ""
                raise NonFiniteLossError(f"epoch {run.epoch + 1}: {error}{best}") from error
            processes.sum(run.meter)
            processes.sum(validation)
            _end_epoch(run, validation, processes, folder, report)
            board.end_epoch(run.history[-1])

        def leave_without_saving(meter: Meter) -> None:
            if stop.requested:  # the model is the best one by now, and last.pt is complete
                raise RunInterruptedError(folder.path)

        def test_best() -> Result:
            run.load_best(folder.best)
            outcomes = Outcomes(dataset.classes)
            tested = evaluate(
                run.evaluated, test, amp=amp, on_step=leave_without_saving, on_batch=outcomes.add
            )
            write_mistakes(folder, outcomes, parts[2], size)
            result = _result(run, tested, folder)
            board.end(result.best_epoch, result.test_loss, result.test_accuracy)
            write_json(folder.result, {**asdict(result), **_paths_as_text(result)})
            return result

        # By one process, so that the images' answers are in one place and in their order.
        result = processes.from_first(test_best)
        report.end(result)
    return result


def _open_folder(config: TrainConfig, run: Run, report: Report) -> RunFolder:
    """A new folder, or the old one with its state put into `run`."""
    if not config.resume:
        return RunFolder.create(config)
    assert config.out is not None  # TrainConfig refuses resume without out
    folder = RunFolder.existing(config.out)
    if folder.has_checkpoint:
        if damage := run.load_last(folder.last):
            report.warn(damage)
        run.find_best(folder.best)
        _write_history(run, folder)  # it may have been killed before it did
    else:  # killed before its first checkpoint: the run begins again
        refuse_other_settings(folder.config, folder.read_config(), config)
    return folder


def _end_epoch(
    run: Run, validation: Meter, processes: Processes, folder: RunFolder, report: Report
) -> None:
    line = {
        "epoch": run.epoch + 1,
        "train_loss": run.meter.mean_loss,
        "train_accuracy": run.meter.accuracy,
        "valid_loss": validation.mean_loss,
        "valid_accuracy": validation.accuracy,
        "lr": run.meter.lr,
        "images_per_second": run.meter.images_per_second,
        "seconds": run.meter.seconds + validation.seconds,
    }
    run.history.append(line)
    run.epoch += 1
    run.meter = Meter()
    best = run.stopping.update(run.epoch, validation.accuracy)

    def write() -> None:
        # The best before the last: killed in between, the epoch is run again and both are right.
        if best:
            run.save_best(folder.best)
        run.save_last(folder.last)
        _write_history(run, folder)

    processes.from_first(write)
    report.end_epoch(line, best=best)


def _write_history(run: Run, folder: RunFolder) -> None:
    folder.write_metrics(run.history)
    if run.history:
        draw_curves(folder.curves, run.history, run.stopping.best_epoch)


def _result(run: Run, tested: Meter, folder: RunFolder) -> Result:
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

"""Several processes that train one model, as torchrun starts them."""

from __future__ import annotations

import gc
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastres.data import DataError
from fastres.train.config import ConfigError
from fastres.train.errors import PeerError, TrainError
from fastres.train.meter import Meter
from fastres.train.model import resolve_device

Value = TypeVar("Value")
_FAILED = 2  # what a process says to `most` instead of its answer


@dataclass
class Processes:
    """This process's place among those that train one model; alone, every method is local.

    What the processes tell each other goes over the CPU, so that no GPU waits for it.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the one that reads, writes and speaks for all."""
        return self.rank == 0

    def any(self, asked: bool) -> bool:
        """Whether one of the processes asks.

        Raises:
            PeerError: one of them has called `fail`.
        """
        if self.size == 1:
            return asked
        answer = torch.tensor(int(asked))
        dist.all_reduce(answer, dist.ReduceOp.MAX, self.group)
        if answer >= _FAILED:
            raise PeerError()
        return bool(answer)

    def fail(self) -> None:
        """Tell the others, who are in `any` or on their way to it, that this process ends."""
        if self.size > 1:
            dist.all_reduce(torch.tensor(_FAILED), dist.ReduceOp.MAX, self.group)

    def sum(self, meter: Meter) -> None:
        """Make `meter` count what all processes counted, in the time of the slowest."""
        meter.read()
        if self.size == 1:
            return
        counts = torch.tensor([meter.loss, meter.correct, meter.images], dtype=torch.float64)
        seconds = torch.tensor(meter.seconds, dtype=torch.float64)
        dist.all_reduce(counts, dist.ReduceOp.SUM, self.group)
        dist.all_reduce(seconds, dist.ReduceOp.MAX, self.group)
        meter.loss, meter.seconds = counts[0].item(), seconds.item()
        meter.correct, meter.images = int(counts[1]), int(counts[2])

    def from_first(self, function: Callable[[], Value]) -> Value:
        """What `function` returns in the first process, which alone calls it.

        Raises:
            PeerError: in the others, when it raised something there.
        """
        if self.size == 1:
            return function()
        message: list[Any] = [None]
        if self.first:
            try:
                message = [(function(),)]
            finally:
                dist.broadcast_object_list(message, 0, self.group)
        else:
            dist.broadcast_object_list(message, 0, self.group)
        if message[0] is None:
            raise PeerError()
        value: Value = message[0][0]
        return value

    def first_before_others(self, function: Callable[[], Value]) -> Value:
        """What `function` returns here, called in the first process before it is in the others.

        Raises:
            PeerError: in the others, when it raised something in the first.
        """
        results: list[Value] = []

        def call() -> None:
            results.append(function())

        self.from_first(call)
        if not results:
            call()
        return results[0]

    def take_statistics_of_first(self, model: nn.Module) -> None:
        """Give `model` the first process's running statistics: each has those of its own images."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wrap(self, model: nn.Module, *, sync_bn: bool) -> nn.Module:
        """`model`, whose gradients are those of all processes' images.

        With `sync_bn` its BatchNorms, in `model` itself, take the statistics of all images too.
        """
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        with warnings.catch_warnings():
            # What torch 2.15 has in its place, torch 2.10 has not.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            wrapped = DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        if sync_bn:  # afterwards, as the wrapper refuses it on CPUs, where torch itself has none
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return wrapped

    def weigh(
        self, loss_function: Callable[[Tensor, Tensor], Tensor]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """`loss_function` with the gradient of the mean over all processes' images.

        The wrapped model takes the mean of the processes' gradients, which is another where the
        processes' shares of a batch differ in size.
        """

        def weighed(logits: Tensor, labels: Tensor) -> Tensor:
            loss = loss_function(logits, labels)
            images = torch.tensor(len(labels), dtype=torch.float64)
            dist.all_reduce(images, group=self.group)
            weight = self.size * len(labels) / images.item()
            loss.register_hook(lambda gradient: gradient * weight)
            return loss

        return weighed if self.size > 1 else loss_function


@contextmanager
def connect(device: str) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that torchrun started (or this one alone), and this one's device.

    Raises:
        ConfigError: there is no such device, or it is one GPU's and there are several processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes(), resolve_device(device)
        return
    here = resolve_device(device)
    if here.type == "cuda":
        if here.index is not None:
            raise ConfigError(
                f"device is {device!r}, expected auto, cpu or cuda: {size} processes share the GPUs"
            )
        here = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    group = dist.new_group(backend="gloo") if here.type == "cuda" else dist.group.WORLD
    processes = Processes(dist.get_rank(), size, group)
    del group
    try:
        yield processes, here
    except (ConfigError, DataError, TrainError) as error:
        traceback.clear_frames(error.__traceback__)  # they hold the wrapped model and its group
        _disconnect(processes)
        raise
    # After any other error a reduction may be under way, in which the others wait for this process
    # and this one would for them; its end is what they see.
    _disconnect(processes)


def _disconnect(processes: Processes) -> None:
    """End gloo's threads, which go when nothing holds the groups any more.

    They let go of tensors after those who wait for a result have it, and a thread that does so
    while Python ends, which takes the tensors' Python objects with it, aborts the process.
    """
    processes.group = None
    dist.destroy_process_group()
    gc.collect()

"""What two processes do together, each check against one process: a script, for test_fits_in.py.

It prints each check's name when it has passed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastres.data.shares import share_of
from fastres.train.distributed import Processes
from tiny_resnets import CLASSES, FUSED, images, plain_resnet

Fuse = Callable[[nn.Module], nn.Module]
IMAGES = images(6, dtype=torch.float64)
LABELS = torch.arange(6) % CLASSES
HALVES = (slice(0, 3), slice(3, 6))


def loss_of(model: nn.Module, part: slice = slice(None)) -> Tensor:
    return nn.functional.cross_entropy(model(IMAGES[part]), LABELS[part])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-11, msg=key)


def assert_same_state(model: nn.Module, plain: nn.Module) -> None:
    """Gradients and buffers."""
    assert_same(*({key: p.grad for key, p in m.named_parameters()} for m in (model, plain)))
    assert_same(*(dict(m.named_buffers()) for m in (model, plain)))


def assert_trains_as_one(
    wrapped: nn.Module, plain: nn.Module, values: Callable[[], dict[str, Tensor]]
) -> None:
    """Two steps, each process on its half of the images, are those of one on both halves."""
    ours, theirs = sgd(wrapped), sgd(plain)
    for _ in range(2):
        loss_of(wrapped, HALVES[dist.get_rank()]).backward()
        sum(0.5 * loss_of(plain, half) for half in HALVES).backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        assert_same(values(), dict(plain.named_parameters()))


def data_parallel(fuse: Fuse) -> None:
    plain = plain_resnet().double()
    model = fuse(plain)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    assert_trains_as_one(wrapped, plain, lambda: dict(model.named_parameters()))


def uneven_shares(fuse: Fuse) -> None:
    """As ``fastres train --sync-bn``: one has two images, the other three."""
    plain = plain_resnet().double()
    model = fuse(plain)
    processes = Processes(dist.get_rank(), 2, dist.group.WORLD)
    mine = share_of(0, 5, (processes.rank, processes.size))
    assert mine.stop - mine.start == (2, 3)[processes.rank]
    wrapped = processes.wrap(model, sync_bn=True)
    cross_entropy = processes.weigh(nn.functional.cross_entropy)
    cross_entropy(wrapped(IMAGES[mine]), LABELS[mine]).backward()
    loss_of(plain, slice(0, 5)).backward()
    assert_same_state(model, plain)


def fully_sharded(fuse: Fuse) -> None:
    plain = plain_resnet().double()
    model = fuse(plain)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def values() -> dict[str, Tensor]:
        return {key: value.full_tensor() for key, value in model.named_parameters()}

    assert_trains_as_one(model, plain, values)


def fully_sharded_in_eval_mode(fuse: Fuse) -> None:
    """Each forward gathers the weights anew: none is used as it was before a step."""
    plain = plain_resnet().eval()
    model = fuse(plain)
    for block in model.blocks():
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model)
    optimizers = sgd(model), sgd(plain)
    for _ in range(3):
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            loss = nn.functional.cross_entropy(m(IMAGES.float()), LABELS)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            actual, expected = model(IMAGES.float()), plain(IMAGES.float())
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def assert_statistics_of_both(model: nn.Module, plain: nn.Module) -> None:
    """Gradients and running statistics are those of one process with all images."""
    half = HALVES[dist.get_rank()]
    (loss_of(model, half) / 2).backward()
    loss_of(plain).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    assert_same_state(model, plain)


def synchronised_after_fusing(fuse: Fuse) -> None:
    plain = plain_resnet().double()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(plain))
    assert_statistics_of_both(model, plain)


def synchronised_before_fusing(fuse: Fuse) -> None:
    plain = plain_resnet().double()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    converted._norm_layer = nn.SyncBatchNorm
    assert_statistics_of_both(fuse(converted), plain)


CHECKS = (
    data_parallel,
    uneven_shares,
    fully_sharded,
    fully_sharded_in_eval_mode,
    synchronised_after_fusing,
    synchronised_before_fusing,
)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for check in CHECKS:
        for name, fuse in FUSED.items():
            torch.manual_seed(0)
            check(fuse)
            print(check.__name__, name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""The max-pool after the stem, with the BatchNorm and ReLU that are still pending before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import ops
from .chain import Deferred
from .conv_bn import Module, Pending, finish, is_untouched, is_watched, shows_modules


def max_pool(pool: Module, x: Tensor | Pending | Deferred) -> Any:
    """``pool(x)``, by the fused op on the CPU and in training. ``pool`` may be any module.

    A tensor, or ``Deferred`` where x is; then ``pool`` must be one that ``pools_later``.
    """
    geometry = pool_geometry(pool)
    if isinstance(x, Deferred):
        return x if geometry is None else x.max_pool(*geometry)
    z = x.z if isinstance(x, Pending) else x
    pending = isinstance(x, Pending)
    if geometry is None or shows_modules(z) or not (pending or z.device.type == "cpu"):
        return pool(finish(x, relu=True))
    return ops.max_pool2d(z, *geometry, *(x[1:] if pending else ()))


def pools_later(pool: Module) -> bool:
    """Whether the units that pool follows and is followed by can wait: see ``chain.Deferred``."""
    return is_untouched(pool, nn.Identity) or pool_geometry(pool) is not None


def pool_geometry(pool: Module) -> tuple[list[int], list[int], list[int]] | None:
    """Kernel size, stride and padding where the op says the same as calling ``pool``, else None."""
    if not (
        is_untouched(pool, nn.MaxPool2d)
        and pool.dilation in (1, (1, 1))
        and not pool.ceil_mode
        and not pool.return_indices
        and not is_watched()
    ):
        return None
    kernel_size, stride, padding = (
        [size, size] if isinstance(size, int) else list(size)
        for size in (pool.kernel_size, pool.stride, pool.padding)
    )
    if len(kernel_size) != 2 or len(stride) != 2 or len(padding) != 2:
        return None
    return kernel_size, stride, padding

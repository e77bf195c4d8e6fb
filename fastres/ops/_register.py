"""How an op gets its parts: shape function, gradient, reference and Triton launcher.

The schemas and the CPU kernels come with the C++ extension; everything here happens at import,
before anything can be compiled.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastres.ops import reference

OPS = (
    "add_relu",
    "add_relu_backward",
    "bn_add_relu",
    "bn_add_relu_backward",
    "max_pool2d",
    "max_pool2d_backward",
    "pack_conv_weight",
    "conv_bn_relu",
    "conv_chain",
    "conv_stats",
    "conv_stats_backward",
)
# Which module of fastres.kernels holds an op's Triton launcher. Packing is for the CPU alone.
LAUNCHERS = {
    "add_relu": "add_relu",
    "add_relu_backward": "add_relu",
    "bn_add_relu": "bn_add_relu",
    "bn_add_relu_backward": "bn_add_relu",
    "conv_bn_relu": "conv",
    "conv_stats": "conv",
    "conv_stats_backward": "conv_backward",
    "max_pool2d": "max_pool2d",
    "max_pool2d_backward": "max_pool2d",
}

# Keeps the registrations alive for as long as the process.
_library = torch.library.Library("fastres", "IMPL")


def why_no_triton() -> str | None:
    """None where Triton kernels can run, else the reason that they cannot."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def register_op(
    name: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Give the op `fastres::name` its shape function, gradient, reference and launcher."""
    qualified = f"fastres::{name}"
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(
        qualified, backward or _no_second_derivative(name), setup_context=setup_context
    )
    _library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    if name in LAUNCHERS and importlib.util.find_spec("triton") is not None:
        _library.impl(name, _launcher(name), "CUDA")


def _launcher(name: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        # Imported at the first call: importing triton takes longer than all of fastres.
        return getattr(importlib.import_module(f"fastres.kernels.{LAUNCHERS[name]}"), name)(*args)

    return launch


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"fastres::{name} has no derivative (double backward is not supported by the fused "
            "ops): build the model with fused=False"
        )

    return backward

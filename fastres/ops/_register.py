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
    "avg_pool_linear",
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
    """Give the op `fastres::name` its shape function, gradient, reference and launcher.

    Without a `backward` its gradient is the reference's, and so are all second derivatives: those
    of a fused op are the derivatives of the op that computes its backward.
    """
    qualified = f"fastres::{name}"
    plain = getattr(reference, name)
    torch.library.register_fake(qualified, fake)
    if backward is None:
        setup_context, backward = _setup_context, _gradient_of(plain)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    _library.impl(name, plain, "CompositeExplicitAutograd")
    # torch.func's transforms (grad, vmap, jvp, ...) know torch's own ops alone.
    _library.impl(name, plain, "FuncTorchDynamicLayerFrontMode")
    if name in LAUNCHERS and importlib.util.find_spec("triton") is not None:
        _library.impl(name, _launcher(name), "CUDA")


def _launcher(name: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        # Imported at the first call: importing triton takes longer than all of fastres.
        return getattr(importlib.import_module(f"fastres.kernels.{LAUNCHERS[name]}"), name)(*args)

    return launch


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]


def _gradient_of(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of a function in plain torch, computed anew from its inputs; of any order."""

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        with torch.enable_grad():
            # Views, so that the gradient stops at them and not at what computed the inputs.
            inputs = [
                other if x is None else x.view_as(x)
                for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)
            ]
            results = plain(*inputs)
        pairs = zip(results if isinstance(results, tuple) else (results,), grads, strict=True)
        depend = [(result, grad) for result, grad in pairs if result.requires_grad]
        found = iter(
            torch.autograd.grad(
                [result for result, _ in depend],
                [x for x, needed in zip(inputs, needs, strict=True) if needed],
                [grad for _, grad in depend],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
        return tuple(next(found) if needed else None for needed in needs)

    return backward

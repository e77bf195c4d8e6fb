"""A fused model captured in a CUDA graph: the same kernels without the launches, for fixed shapes.

    forward = fastres.cuda_graph.capture_inference(model.eval(), images, autocast=torch.bfloat16)
    logits = forward(more_images)

    step = fastres.cuda_graph.capture_training(model.train(), F.cross_entropy, images, labels)
    for images, labels in batches:
        loss = step(images, labels)  # gradients are in the parameters' .grad
        optimizer.step()

A graph repeats what was captured, on the memory that it was captured with: parameters may change in
place (an optimizer, load_state_dict), but after ``model.to(...)`` or a change of the model's mode
it must be captured again. The optimizer stays outside, so that its learning rate can change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["GraphedInference", "GraphedTraining", "capture_inference", "capture_training"]

Loss = Callable[[Tensor, Tensor], Tensor]
# torch's notes on CUDA graphs: libraries choose their algorithms in the first runs.
_WARM_UP = 3


def _check(op: str, model: nn.Module, training: bool, tensors: dict[str, Tensor]) -> None:
    """All that can be wrong, before any work."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is {type(model).__name__}, expected an nn.Module")
    if model.training != training:
        mode, call = ("training", "train") if training else ("eval", "eval")
        raise ValueError(f"{op}: model is not in {mode} mode, expected model.{call}() before")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is {type(tensor).__name__}, expected a Tensor")
    if not torch.cuda.is_available():
        raise RuntimeError(f"{op}: torch sees no CUDA device, and a CUDA graph needs one")
    for name, tensor in (*model.named_parameters(), *model.named_buffers(), *tensors.items()):
        if tensor.device.type != "cuda":
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected on a CUDA device")


def _check_like(name: str, given: Tensor, static: Tensor) -> None:
    if given.shape != static.shape or given.dtype != static.dtype:
        raise ValueError(
            f"{name} is {given.dtype} {tuple(given.shape)}, expected {static.dtype} "
            f"{tuple(static.shape)}, for which the graph was captured"
        )


def _autocast(dtype: torch.dtype | None) -> torch.autocast:
    # Without its cache: a cast that a warm-up made is not in the graph, and would never be renewed.
    return torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False)


def _warm_up(run: Callable[[], object]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)


class _Graphed:
    """A graph with the tensors that it reads."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        self._model, self._training = model, model.training
        self._inputs = inputs
        self._graph = torch.cuda.CUDAGraph()

    def _replay(self, given: Sequence[Tensor]) -> None:
        if self._model.training != self._training:
            raise RuntimeError("the model's mode has changed since its graph was captured")
        for (name, static), tensor in zip(self._inputs.items(), given, strict=True):
            _check_like(name, tensor, static)
        for static, tensor in zip(self._inputs.values(), given, strict=True):
            static.copy_(tensor, non_blocking=True)
        self._graph.replay()


class GraphedInference(_Graphed):
    """What `capture_inference` returns: call it with images like those it was captured with."""

    output: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """The model's output for `images`, in memory that the next call writes over.

        Raises:
            ValueError: `images` has not the captured shape and dtype.
            RuntimeError: the model's mode has changed.
        """
        self._replay([images])
        return self.output


def capture_inference(
    model: nn.Module, images: Tensor, autocast: torch.dtype | None = None
) -> GraphedInference:
    """Capture `model` in eval mode on images like `images` in a CUDA graph.

    Args:
        model: in eval mode, all of it on one CUDA device.
        images: (N, 3, H, W) on that device; only its shape, dtype and values' layout matter.
        autocast: the dtype to compute in, as torch.autocast takes it; None for the model's own.

    Returns:
        A function from images to the model's output, without gradients.

    Raises:
        TypeError, ValueError: an argument is not what it should be; it is named.
        RuntimeError: torch sees no CUDA device.
    """
    _check("capture_inference", model, False, {"images": images})
    graphed = GraphedInference(model, {"images": _copy(images)})
    static = graphed._inputs["images"]

    def forward() -> Tensor:
        with torch.inference_mode(), _autocast(autocast):
            output: Tensor = model(static)
            return output

    with torch.cuda.device(images.device):
        _warm_up(forward)
        with torch.cuda.graph(graphed._graph):
            graphed.output = forward()
    return graphed


class GraphedTraining(_Graphed):
    """What `capture_training` returns: forward, loss and backward of one batch."""

    loss: Tensor
    _gradients: list[Tensor | None]

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """The batch's loss; its gradients replace those in the parameters' ``.grad``.

        Raises:
            ValueError: `images` or `targets` has not the captured shape and dtype.
            RuntimeError: the model's mode has changed.
        """
        self._replay([images, targets])
        # They were captured where they lie; a zero_grad() may have let go of them.
        for parameter, gradient in zip(self._model.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        return self.loss


def capture_training(
    model: nn.Module,
    loss: Loss,
    images: Tensor,
    targets: Tensor,
    autocast: torch.dtype | None = None,
) -> GraphedTraining:
    """Capture forward, loss and backward of a training step in a CUDA graph.

    The model is left as it was: the runs before the capture are undone in its buffers (running
    statistics), and its gradients are cleared. torch.amp.GradScaler cannot be used: take bfloat16.

    Args:
        model: in training mode, all of it on one CUDA device.
        loss: from the model's output and the targets to a scalar.
        images: (N, 3, H, W) on that device.
        targets: what `loss` takes, on that device.
        autocast: the dtype to compute in, as torch.autocast takes it; None for the model's own.

    Returns:
        A function from images and targets to the loss, a scalar in memory that the next call
        writes over. `optimizer.step()` comes after it, and no `zero_grad()` is needed.

    Raises:
        TypeError, ValueError: an argument is not what it should be; it is named.
        RuntimeError: torch sees no CUDA device.
    """
    _check("capture_training", model, True, {"images": images, "targets": targets})
    graphed = GraphedTraining(model, {"images": _copy(images), "targets": _copy(targets)})
    static_images, static_targets = graphed._inputs.values()
    before = [buffer.clone() for buffer in model.buffers()]

    def step() -> Tensor:
        with _autocast(autocast):
            value = loss(model(static_images), static_targets)
        value.backward()
        return value.detach()

    def step_anew() -> None:
        model.zero_grad(set_to_none=True)
        step()

    with torch.cuda.device(images.device):
        _warm_up(step_anew)
        # None, so that the capture's backward writes gradients instead of adding to them.
        model.zero_grad(set_to_none=True)
        with torch.cuda.graph(graphed._graph):
            graphed.loss = step()
    graphed._gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
    return graphed


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()

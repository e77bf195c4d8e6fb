"""relu(input + residual) and its gradient, one flat pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import accumulator, channels_last, is_wide, require_like

BLOCK = 2048


@triton.jit
def add_relu_fwd_kernel(
    input,  # (numel,)
    residual,  # (numel,) dtype of input
    output,  # (numel,) dtype of input
    numel,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    offset = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offset < numel
    value = tl.load(input + offset, mask=mask, other=0.0).to(ACC)
    value += tl.load(residual + offset, mask=mask, other=0.0).to(ACC)
    value = tl.where(value < 0, 0.0, value)
    tl.store(output + offset, value.to(output.dtype.element_ty), mask=mask)


@triton.jit
def add_relu_bwd_kernel(
    dy,  # (numel,)
    y,  # (numel,) dtype of dy, what the forward returned
    dinput,  # (numel,) dtype of dy
    numel,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    offset = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offset < numel
    gradient = tl.load(dy + offset, mask=mask, other=0.0).to(ACC)
    gradient = tl.where(tl.load(y + offset, mask=mask, other=0.0).to(ACC) <= 0, 0.0, gradient)
    tl.store(dinput + offset, gradient.to(dinput.dtype.element_ty), mask=mask)


def _dense(tensor: Tensor) -> Tensor:
    return channels_last(tensor) if tensor.dim() == 4 else tensor.contiguous()


def _launch(kernel: triton.JITFunction, first: Tensor, second: Tensor) -> Tensor:
    first, second = _dense(first), _dense(second)
    output = torch.empty_like(first)
    numel = first.numel()
    if numel == 0:
        return output
    with torch.cuda.device_of(first):
        kernel[(triton.cdiv(numel, BLOCK),)](
            first,
            second,
            output,
            numel,
            ACC=accumulator(first.dtype),
            WIDE=is_wide(first),
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return output


def add_relu(input: Tensor, residual: Tensor) -> Tensor:
    """relu(input + residual) of two tensors of one shape and dtype; NaN passes, as in torch.

    Four-dimensional results are channels_last. Raises RuntimeError where shape, dtype or device
    of the residual differ from the input's.
    """
    require_like("add_relu", "residual", residual, "input", input)
    return _launch(add_relu_fwd_kernel, input, residual)


def add_relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    """dy where not (y <= 0), else 0: the gradient of both of add_relu's arguments."""
    require_like("add_relu_backward", "dy", dy, "y", y)
    return _launch(add_relu_bwd_kernel, dy, y)

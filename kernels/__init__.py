"""Triton kernels and their launchers: ``fastres.kernels.<op>`` takes the arguments of the op's
schema, in order, and returns what it returns. Nothing is registered here.

Needs only torch and triton. One kernel file holds the jit forward, the jit backward and the
launcher. See ``choice`` for who convolves.
"""

from .add_relu import add_relu, add_relu_backward
from .bn_add_relu import bn_add_relu, bn_add_relu_backward
from .choice import choose_conv
from .conv import conv_bn_relu, conv_stats
from .conv_backward import conv_stats_backward
from .max_pool2d import max_pool2d, max_pool2d_backward

__all__ = [
    "add_relu",
    "add_relu_backward",
    "bn_add_relu",
    "bn_add_relu_backward",
    "choose_conv",
    "conv_bn_relu",
    "conv_stats",
    "conv_stats_backward",
    "max_pool2d",
    "max_pool2d_backward",
]

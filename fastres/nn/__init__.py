"""The conv-bn-relu unit: by the fused ops where they fit, by its modules everywhere else."""

from .conv_bn import Pending, conv_bn_add_relu, conv_bn_relu, finish, project
from .packed import PackedWeights
from .units import FusedUnits

__all__ = [
    "FusedUnits",
    "PackedWeights",
    "Pending",
    "conv_bn_add_relu",
    "conv_bn_relu",
    "finish",
    "project",
]

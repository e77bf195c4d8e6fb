"""The conv-bn-relu unit and the max-pool after the first: by the fused ops where they fit, by their
modules everywhere else."""

from .conv_bn import Pending, conv_bn_add_relu, conv_bn_relu, finish, kept_anyway, project
from .max_pool import max_pool, pool_geometry
from .packed import PackedWeights
from .units import FusedUnits

__all__ = [
    "FusedUnits",
    "PackedWeights",
    "Pending",
    "conv_bn_add_relu",
    "conv_bn_relu",
    "finish",
    "kept_anyway",
    "max_pool",
    "pool_geometry",
    "project",
]

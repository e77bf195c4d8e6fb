"""The fused ops in models that others wrote: `fuse_model`, and what it reports."""

from .model import fuse_model
from .report import FusedUnit, FuseReport, LeftLayer

__all__ = ["FuseReport", "FusedUnit", "LeftLayer", "fuse_model"]

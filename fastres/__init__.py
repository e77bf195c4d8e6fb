"""fastres: ResNets made fast without changing their answers."""

from fastres import ops
from fastres.version import __version__

__all__ = ["__version__", "ops"]

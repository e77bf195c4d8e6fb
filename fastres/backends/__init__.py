"""What may compute an op, to be asked and set from Python, in the manner of ``torch.backends``."""

from fastres.backends import cpu

__all__ = ["cpu"]

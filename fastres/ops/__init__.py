"""The ops."""

import torch  # noqa: F401

from fastres import _C  # noqa: F401

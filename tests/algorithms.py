"""Names of the CPU's convolution algorithms, as parameters of tests."""

import pytest

from fastres import _C

AMX = pytest.param(
    "amx", marks=pytest.mark.skipif(_C.cpu_capability() != "amx", reason="AMX is not in use")
)

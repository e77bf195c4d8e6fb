"""Names of the CPU's convolution algorithms, as parameters of tests."""

import pytest

from fastres import _C

_without_amx = pytest.mark.skipif(_C.cpu_capability() != "amx", reason="AMX is not in use")
AMX = pytest.param("amx", marks=_without_amx)
DIGITS = pytest.param("digits", marks=_without_amx)

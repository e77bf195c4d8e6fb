"""Triton's kernels against float64, run by Triton's interpreter on the CPU.

The interpreter must be chosen before triton is imported, so the checks run in a process of their
own: tests/triton_interpreter_checks.py for values, tests/triton_address_checks.py for addresses.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import triton

HERE = Path(__file__).parent


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


@pytest.mark.skipif(
    version(triton.__version__) < (3, 7) and version(numpy.__version__) >= (2, 4),
    reason="the interpreter of triton < 3.7 needs numpy < 2.4",
)
@pytest.mark.parametrize("checks", ["triton_interpreter_checks.py", "triton_address_checks.py"])
def test_kernels_in_the_interpreter(checks: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / checks)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    for variable in ("FASTRES_GPU_CONV", "FASTRES_GPU_TABLE"):
        environment.pop(variable, None)
    run = subprocess.run(
        command, env=environment, cwd=HERE.parent, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout, run.stdout

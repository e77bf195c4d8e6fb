"""Code that tests run in threads and in Python processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastres import _C

MINUTES = 10  # a process that waits for one that is gone must not wait for ever


def in_threads(count: int, work: Callable[[int], bool]) -> list[int]:
    """Runs ``work(i)`` for every i < count at once; returns those i for which it was False."""
    start = threading.Barrier(count)

    def run(i: int) -> bool:
        start.wait()
        return work(i)

    with ThreadPoolExecutor(count) as threads:
        return [i for i, right in enumerate(threads.map(run, range(count))) if not right]


def run_python(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs ``script`` with these environment variables besides this process's own."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def on_other_instruction_sets(test: Callable[[str], None]) -> Callable[[str], None]:
    """Marks a test that is called with each instruction set but the one in use."""
    others = sorted(set(_C.available_cpu_capabilities()) - {_C.cpu_capability()})
    given = "FASTRES_CPU_CAPABILITY" in os.environ
    skip = pytest.mark.skipif(given, reason="runs on the instruction set that it names")
    return skip(pytest.mark.parametrize("isa", others)(test))


def run_tests(file: str, select: str, isa: str) -> None:
    """Runs the tests of ``file`` that ``-k select`` takes in a process of this instruction set."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", select, file],
        env=os.environ | {"FASTRES_CPU_CAPABILITY": isa, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def in_two(path: Path, *arguments: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of both processes, started as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(path), *arguments],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=60 * MINUTES) for process in processes]
    return [(p.returncode, *text) for p, text in zip(processes, said, strict=True)]

"""Code that tests run in threads and in Python processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


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

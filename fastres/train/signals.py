"""SIGINT and SIGTERM as requests that a run answers between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """Whether SIGINT or SIGTERM came."""

    requested = False


@contextmanager
def stop_on_signal() -> Iterator[StopSignal]:
    """Turn the first SIGINT or SIGTERM into a request; a second one acts as without this."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        for each, handler in former.items():
            signal.signal(each, handler)

    for number in former:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)

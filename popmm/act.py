"""Attach and detach as one act: one at a time in a process, and whole whatever comes in between."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LOCK = threading.RLock()  # over check, build and install


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the end; then it comes as ever."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is None:
        yield  # interrupts come to the main thread alone
        return
    held = []

    def hold(*args) -> None:
        held.append(args)

    before = signal.getsignal(signal.SIGINT)
    try:
        try:
            signal.signal(signal.SIGINT, hold)
            yield
        finally:
            signal.signal(signal.SIGINT, before)
    finally:  # a second time, for what may be raised in the line above
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def whole_act() -> Iterator[None]:
    """One act at a time, with Ctrl-C held back until its end."""
    with LOCK, uninterrupted():
        yield

"""One model holds one partition: one thread at a time, and one pass at a time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

LOOKS = 0.002  # seconds between two looks of a thread whether its turn has come


class Exclusive:
    """Refuses whoever comes in between, or has it wait for its turn. ``with exclusive("generate"): ...``

    Args:
        waiting: calls of other threads that may wait, in the order in which they came.
    """

    def __init__(self, waiting: int = 0) -> None:
        self._lock = threading.RLock()
        self._waiting, self._turns = waiting, deque()
        self._counts = threading.Lock()
        self.in_pass = False

    @contextmanager
    def __call__(self, action: str, waits: bool = False, queues: bool = False) -> Iterator[None]:
        """Refuses a second thread.

        Args:
            waits: until the other has done, whoever else is waiting.
            queues: if there is room among those that may wait.
        """
        if not self._enter(waits) and not (queues and self._wait_for_turn()):
            full = f" ({self._waiting} calls are waiting already)" if queues and self._waiting else ""
            raise RuntimeError(
                f"{action}: another thread is running this model, which holds one partition at a time{full}. Run its "
                "calls one after another, or have them wait (PopConfig(waiting_calls=8)), batch the prompts into one "
                "call, or attach a second copy of the model"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _enter(self, waits: bool) -> bool:
        """Takes the lock at once, unless others wait for it; or once it is free."""
        mine = self._lock._is_owned()
        return (waits or mine or not self._turns) and self._lock.acquire(blocking=waits)

    def _wait_for_turn(self) -> bool:
        """Takes the lock when all that came before have had it; False if too many wait."""
        turn = object()
        with self._counts:
            if len(self._turns) >= self._waiting:
                return False
            self._turns.append(turn)
        try:
            while self._turns[0] is not turn or not self._lock.acquire(blocking=False):
                time.sleep(LOOKS)
        finally:
            self._turns.remove(turn)
        return True

    @contextmanager
    def between_passes(self, action: str, waits: bool = False) -> Iterator[None]:
        """Refuses a second thread, and a call from inside a pass."""
        with self(action, waits):
            if self.in_pass:
                raise RuntimeError(
                    f"{action} was called from inside the model's own forward (a hook, a callback): call it after that"
                )
            yield

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """A pass of the decoder, refused inside another one: it would change the partition under it."""
        if self.in_pass:
            raise RuntimeError(
                "the model was called from inside its own forward (a hook, a callback): popmm holds one partition at a "
                "time; call it after the pass, or popmm.detach(model) first"
            )
        try:
            try:
                self.in_pass = True
                yield
            finally:
                self.in_pass = False
        finally:  # a second time, for what may be raised in the line above
            self.in_pass = False

"""One model holds one partition: one thread at a time, and one pass at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Exclusive:
    """Refuses whoever comes in between. ``with exclusive("generate"): ...``"""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.in_pass = False

    @contextmanager
    def __call__(self, action: str, waits: bool = False) -> Iterator[None]:
        """Refuses a second thread, or waits until it has done."""
        if not self._lock.acquire(blocking=waits):
            raise RuntimeError(
                f"{action}: another thread is running this model, which holds one partition at a time. Run its "
                "calls one after another, batch the prompts into one call, or attach a second copy of the model"
            )
        try:
            yield
        finally:
            self._lock.release()

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

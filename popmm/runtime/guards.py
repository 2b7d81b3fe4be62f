"""Compiled steps without comparing what they were compiled for, where nothing can have changed."""

from __future__ import annotations

import contextlib
import threading

import torch

from popmm.compat import is_alone, is_default_stance

WARM = 2  # steps of one form in a generate, from which on nothing is compiled any more

_one_holds = threading.Lock()


class Guards(contextlib.AbstractContextManager):
    """Inside, guards are not compared, if nobody else in the process could run compiled code by that.

    What was compiled for the steps before holds for the next one, and to compare hundreds of modules with what was
    compiled for takes a fifth of a small model's step.
    """

    def __enter__(self) -> None:
        self._held = None
        if is_default_stance() and is_alone() and _one_holds.acquire(blocking=False):
            self._held = torch.compiler.set_stance(skip_guard_eval_unsafe=True)
            self._held.__enter__()

    def __exit__(self, *raised) -> None:
        if self._held is not None:
            try:
                self._held.__exit__(*raised)
            finally:
                _one_holds.release()


def held_after(steps: int) -> contextlib.AbstractContextManager:
    """What a compiled step runs in, after so many steps of the same ``generate``, cache, partition and form."""
    return Guards() if steps >= WARM else contextlib.nullcontext()

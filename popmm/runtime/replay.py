"""Compiled steps on the CPU run again as they ran before: what CUDA graphs are on a GPU.

Inductor's code is Python that calls a kernel, checks sizes, makes a tensor, calls the next, some fifteen times a
layer: a sixth of a small model's step. Over a static cache the tensors stay where they are from step to step, so a step
is recorded once (``popmm.runtime.recorded``), as a program of native calls.

A recording serves only after it has computed the same as the compiled code, bit for bit, from the same state.
"""

from __future__ import annotations

import builtins
import itertools
import logging
import os
import threading
import types
from collections.abc import Callable
from typing import Any

import torch

from popmm.compat import inductor
from popmm.kernels import operators
from popmm.runtime.recorded import Recorded, equal, record

logger = logging.getLogger("popmm")

TRIES = 4  # recordings of one graph, whose inputs lie elsewhere again and again, until it is left alone


def serves() -> bool:
    """Whether steps can be recorded here. ``POPMM_REPLAY=0`` in the environment turns it off."""
    return os.environ.get("POPMM_REPLAY") != "0" and operators.available()


_copies = itertools.count()


def compile_apart(function: Callable, settings: dict[str, Any], device: torch.device) -> Callable:
    """A copy of a function, compiled and replayed, whose graphs are counted for no other; it may name no globals.

    Args:
        settings: of ``torch.compile``.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_copies)}")
    names = {"__builtins__": builtins, "__name__": __name__}  # the compiler keeps its code among a function's globals
    copied = types.FunctionType(code, names, code.co_name, closure=function.__closure__)
    return torch.compile(copied, **replaying(settings, device))


def replaying(settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Settings of ``torch.compile``, by a compiler whose steps are replayed where they ask for Inductor as it is.

    On a CPU ``reduce-overhead`` is that too: what it does there on a GPU is what replays do here.
    """
    plain = settings.get("backend", "inductor") == "inductor" and not settings.get("options")
    plain = plain and settings.get("mode") in (None, "default", "reduce-overhead")
    if not plain or device.type != "cpu" or not serves():
        return settings
    return {**settings, "backend": replayed_inductor, "mode": None}


def replayed_inductor(graph: torch.fx.GraphModule, inputs: list) -> Callable:
    """A backend for ``torch.compile``: Inductor's code, replayed."""
    return Replayed(inductor.compile_graph(graph, inputs))


class Replayed:
    """A compiled graph: after a plain call one that is recorded, then one that checks the recording, then replays."""

    def __init__(self, compiled: Callable) -> None:
        self.compiled = compiled
        self.recorded: Recorded | None = None
        self.replays = 0  # calls so far
        self._stage: Callable[[tuple], Any] = self._first
        self._stay: set[int] = set()  # small inputs that the graph writes
        self._left = TRIES
        self._busy = threading.Lock()

    def __call__(self, *args):
        if not inductor.may_watch() or not self._busy.acquire(blocking=False):
            return self.compiled(*args)
        try:
            return self._stage(args)
        finally:
            self._busy.release()

    def _plain(self, args: tuple):
        return self.compiled(*args)

    def _first(self, args: tuple):
        """What a first call loads, later ones find."""
        self._stage = self._record
        return self.compiled(*args)

    def _record(self, args: tuple):
        self._left -= 1
        self._stage, self.recorded = self._plain, None
        recorded, results = record(self.compiled, args, self._stay)
        if recorded.lost:
            logger.info("popmm: a compiled step is not replayed: %s", recorded.lost)
        elif recorded.written_copies:
            self._stay |= recorded.written_copies
            self._left += 1
            self._stage = self._record
        else:
            self._stage, self.recorded = self._check, recorded
        return results

    def _check(self, args: tuple):
        recorded = self.recorded
        if not recorded.fits(args):
            return self._again(args)
        self._stage = self._plain
        before = recorded.state(args)
        results = self.compiled(*args)
        after = recorded.state(args)
        try:
            recorded.set_state(args, before)
            same = equal(recorded(args), results) and equal(recorded.state(args), after)
        finally:
            recorded.set_state(args, after)
        if same:
            self._stage = self._replay
        else:
            self.recorded = None
            logger.warning("popmm: a recorded step computed different results than its compiled code: not replayed")
        return results

    def _replay(self, args: tuple):
        if not self.recorded.fits(args):
            return self._again(args)
        self.replays += 1
        return self.recorded(args)

    def _again(self, args: tuple):
        """Another recording for inputs that lie elsewhere; none for other numbers (lengths that Python counts)."""
        self._stage = self._record if self._left and self.recorded.counts_as(args) else self._plain
        return self._stage(args)

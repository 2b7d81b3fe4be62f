"""Raises at chosen lines of popmm's own code, and compares what a model was before and after."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import popmm
from popmm.runtime.experts_interface import _switched

ROOMS = tuple({str(Path(popmm.__file__).parent), str(Path(popmm.adapters.__file__).parent)})


class Injected(Exception):
    """What is raised in the middle of an act."""


def _own(frame) -> bool:
    return frame.f_code.co_filename.startswith(ROOMS)


def _traced(call: Callable, on_line: Callable) -> None:
    def tracer(frame, event, arg):
        if not _own(frame):
            return None
        if event == "line":
            on_line(frame)
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        call()
    finally:
        sys.settrace(before)


def lines_of(call: Callable) -> list[tuple[str, int]]:
    """Lines of popmm that ``call`` runs, each once, in the order in which they are first reached."""
    found: dict[tuple[str, int], None] = {}
    _traced(call, lambda frame: found.setdefault((frame.f_code.co_filename, frame.f_lineno)))
    return list(found)


def interrupt(call: Callable, line: tuple[str, int], by_signal: bool) -> bool:
    """Runs ``call`` with an exception (or Ctrl-C) raised when ``line`` is first reached; whether it came through."""
    done = False

    def on_line(frame) -> None:
        nonlocal done
        if not done and (frame.f_code.co_filename, frame.f_lineno) == line:
            done = True
            if by_signal:
                os.kill(os.getpid(), signal.SIGINT)
            else:
                raise Injected(f"{line[0]}:{line[1]}")

    try:
        _traced(call, on_line)
    except BaseException:  # what was injected may have been told in other words
        if not done:
            raise
        return True
    return False


def picture_of(model) -> dict:
    """Everything of a model that attach might leave behind: attributes, hooks, implementation, memory and bytes."""
    found: dict = {"switched": len(_switched), "handler": signal.getsignal(signal.SIGINT)}
    found["experts"] = getattr(model.config, "_experts_implementation", None)
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):
                found[name, key] = {k: id(v) for k, v in value.items() if not isinstance(v, torch.Tensor)}
            else:
                found[name, key] = id(value)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        raw = tensor.detach().contiguous().view(torch.uint8)
        found[name] = (tensor.data_ptr(), tensor.stride(), tensor.shape, tensor.dtype, raw.numpy().tobytes())
    return found

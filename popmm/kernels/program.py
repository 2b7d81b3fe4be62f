"""Calls of compiled code as a program: native ones one after the other without Python, torch's between them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from popmm.kernels.build import operators


class Program:
    """Calls over tensors that stay where they are, in the order in which they were recorded.

    popmm's operators note themselves (``recording``), with the tensors that they name; of all else whoever records
    keeps what is named.
    """

    def __init__(self) -> None:
        self._library = operators()
        self._steps: list[int | Callable[[], None]] = []  # native programs by their addresses
        self.calls = 0  # without those that operators note

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, operators that this thread runs note themselves."""
        try:
            self._library.record(self._native())
            yield
        finally:
            self._library.record(None)

    def _native(self) -> int:
        """The native program that the next call belongs to."""
        if not self._steps or callable(self._steps[-1]):
            address = self._library.new_program()
            weakref.finalize(self, self._library.free_program, address)
            self._steps.append(address)
        return self._steps[-1]

    def append(self, function: int, arguments: Sequence[Tensor | int]) -> bool:
        """Notes a call of a C function that takes addresses and int64, and returns nothing.

        Returns:
            False if there are too many arguments.
        """
        words = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        given = (ctypes.c_int64 * len(words))(*words)
        self.calls += 1
        return bool(self._library.append_call(self._native(), function, given, len(words)))

    def append_torch(self, call: Callable[[], None]) -> None:
        """Notes a call through Python; only while ``recording``."""
        self._steps.append(call)
        self.calls += 1
        self._library.record(self._native())

    def run(self) -> None:
        """
        Raises:
            RuntimeError: an operator refused; what was computed by then is not undone.
        """
        for step in self._steps:
            if callable(step):
                step()
            else:
                message = self._library.run_program(step)
                if message:
                    raise RuntimeError(message.decode())

"""A down projection stored by channel, so that one channel's column is one piece of memory."""

from __future__ import annotations

from torch import Tensor


class Turned:
    """A parameter ``[(E,) d_model, d_ff]`` stored by channel in its own memory, so that whatever shares it still does.

    ``values`` holds its contents while the memory is being written: interrupted anywhere, ``back`` restores them.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.plain = parameter.data  # as it was stored, on the same memory
        self.values: Tensor | None = None

    def forth(self) -> None:
        self.values = self.plain.clone()
        by_channel = self.plain.view(*self.plain.shape[:-2], *self.plain.shape[:-3:-1])
        by_channel.copy_(self.values.mT)
        self.parameter.data = by_channel.mT
        self._tell_autograd()
        self.values = None

    def back(self) -> None:
        now = self.parameter.data
        if self.values is None:
            if now.is_contiguous():
                return  # replaced, or back already
            if now.data_ptr() != self.plain.data_ptr() or now.dtype != self.plain.dtype:  # moved
                self.parameter.data = now.contiguous()
                return
            self.values = now.contiguous()
        self.parameter.data = self.plain
        self.plain.copy_(self.values)
        self._tell_autograd()
        self.values = None

    def _tell_autograd(self) -> None:
        """Graphs that saved the parameter before must not go on: their strides are of another storage order."""
        self.parameter.detach()[:0].zero_()  # writes nothing, and raises the version

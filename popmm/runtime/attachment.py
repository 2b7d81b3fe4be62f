"""What ``attach`` puts on a model, and how it comes off: in steps that may be repeated, whatever they raise."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from popmm.runtime.caches import StaticCaches
from popmm.runtime.experts_interface import switch_off, switch_on
from popmm.runtime.freed import FreedWeights
from popmm.runtime.overrides import Hook, Kept, Override
from popmm.runtime.runner import Runner

MARKER = "_popmm_attachment"  # on the decoder: the model is attached

# modules and parameters of attached FFNs, by id: held by one attachment, and so by one model
_HELD: weakref.WeakValueDictionary[int, Attachment] = weakref.WeakValueDictionary()


@dataclass(eq=False)
class Attachment:
    """What was put on a model, and what stood there before. Kept on the decoder, and so freed with it."""

    decoder: nn.Module
    state: Any  # what ``attach`` returned: the surface's PartitionState
    runner: Runner
    caches: StaticCaches
    switches_experts: bool  # to our implementation of transformers' experts interface
    overrides: list[Override]
    hooks: list[Hook]
    kept: list[Kept]
    holds: list[tuple[nn.Module | nn.Parameter, str]]  # modules and parameters of its FFNs, and their names
    writes: bool  # its parameters, in place
    after_install: list[Callable[[], None]] = field(default_factory=list)
    freed: FreedWeights | None = None

    def install(self) -> None:
        """Puts everything on; the marker last."""
        for held, name in self.holds:
            other = _HELD.get(id(held))
            if other is not None and (isinstance(held, nn.Module) or self.writes or other.writes):
                raise RuntimeError(
                    f"{name} belongs to another attached model too ({other.state!r}): popmm.detach that one first"
                )
        for kept in self.kept:
            kept.install()
        for override in self.overrides:
            override.install()
        for hook in self.hooks:
            hook.register()
        if self.switches_experts:
            switch_on(self.decoder)
        for note in self.after_install:
            note()
        for held, _ in self.holds:
            _HELD[id(held)] = self
        if self.freed is not None:
            self.freed.free()
        self.decoder.__dict__[MARKER] = self

    def remove(self) -> None:
        """Takes everything off; the marker last, so that it can be tried again.

        Raises:
            Whatever putting weights back raises, such as for want of memory or of the files that they came from: then
            the model is still attached.
        """
        if self.freed is not None:
            self.freed.restore()
        self.runner.partitions.restore()
        self.runner.partitions.release()
        if self.switches_experts:
            switch_off(self.decoder)
        for hook in self.hooks:
            hook.remove()
        for override in reversed(self.overrides):
            override.remove()
        self.caches.release()
        for kept in self.kept:
            kept.remove()
        for held, _ in self.holds:
            if _HELD.get(id(held)) is self:
                _HELD.pop(id(held), None)
        self.decoder.__dict__.pop(MARKER, None)

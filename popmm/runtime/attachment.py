"""What ``attach`` puts on a model, and how it comes off: in steps that may be repeated, whatever they raise."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from popmm.runtime.caches import StaticCaches
from popmm.runtime.experts_interface import switch_off, switch_on
from popmm.runtime.phase import Phase

MARKER = "_popmm_attachment"  # on the decoder: the model is attached
_MISSING = object()
# where a torch module keeps its hooks, and what it notes beside them
_HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@dataclass(frozen=True)
class Hook:
    """A hook to put on a module: a forward pre-hook, or a forward hook if ``after``."""

    module: nn.Module
    function: Callable
    after: bool = False
    with_kwargs: bool = False

    def register(self) -> None:
        if self.after:
            self.module.register_forward_hook(self.function, with_kwargs=self.with_kwargs)
        else:
            self.module.register_forward_pre_hook(self.function, with_kwargs=self.with_kwargs)

    def remove(self) -> None:
        """Takes it off, if it is on."""
        hooks = self.module._forward_hooks if self.after else self.module._forward_pre_hooks
        for key in [key for key, function in hooks.items() if function == self.function]:
            for table in reversed(_HOOK_TABLES):  # the hook itself last, for it is what is looked for
                if ("_pre_" in table) != self.after:
                    getattr(self.module, table).pop(key, None)


@dataclass
class Override:
    """An attribute of a module that ours stands in for."""

    module: Any
    name: str
    ours: Any
    before: Any = _MISSING

    def install(self) -> None:
        self.before = self.module.__dict__.get(self.name, _MISSING)
        self.module.__dict__[self.name] = self.ours

    def remove(self) -> None:
        """Puts back what was there, unless somebody has put something around ours: ours is transparent then."""
        if self.module.__dict__.get(self.name, _MISSING) is not self.ours:
            return
        if self.before is _MISSING:
            self.module.__dict__.pop(self.name, None)
        else:
            self.module.__dict__[self.name] = self.before


@dataclass
class Kept:
    """An attribute of a module that calls may change while attached."""

    module: Any
    name: str
    before: Any = _MISSING

    def install(self) -> None:
        self.before = self.module.__dict__.get(self.name, _MISSING)

    def remove(self) -> None:
        if self.before is _MISSING:
            self.module.__dict__.pop(self.name, None)
        else:
            self.module.__dict__[self.name] = self.before


# modules and parameters of attached FFNs, by id: held by one attachment, and so by one model
_HELD: weakref.WeakValueDictionary[int, Attachment] = weakref.WeakValueDictionary()


@dataclass(eq=False)
class Attachment:
    """What was put on a model, and what stood there before. Kept on the decoder, and so freed with it."""

    decoder: nn.Module
    state: Any  # what ``attach`` returned: the surface's PartitionState
    phase: Phase
    caches: StaticCaches
    switches_experts: bool  # to our implementation of transformers' experts interface
    overrides: list[Override]
    hooks: list[Hook]
    kept: list[Kept]
    holds: list[tuple[nn.Module | nn.Parameter, str]]  # modules and parameters of its FFNs, and their names
    writes: bool  # its parameters, in place
    after_install: list[Callable[[], None]] = field(default_factory=list)

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
        self.decoder.__dict__[MARKER] = self

    def remove(self) -> None:
        """Takes everything off; the marker last, so that it can be tried again.

        Raises:
            Whatever putting weights back in order raises, such as for want of memory: then the model is still attached.
        """
        self.phase.restore()
        self.phase.release()
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

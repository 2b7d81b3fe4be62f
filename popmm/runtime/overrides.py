"""Single things that ``attach`` puts on a module: a hook, an attribute in place of another. May be undone twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

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

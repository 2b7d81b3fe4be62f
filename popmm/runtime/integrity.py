"""Whether an attached FFN is still the module that was attached: decode reads its weights past its layers' calls."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from popmm.compat import forward_below_hooks, hook_of

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class Integrity:
    """What an FFN's module was made of at attach."""

    def __init__(
        self, root: nn.Module, name: str, module: nn.Module, places: dict[str, nn.Module] | None = None
    ) -> None:
        self.root, self.name, self.module = root, name, module
        self.places = places or {name: module}  # what stands where in the model
        self.parts = [(inner, id(part), type(part)) for inner, part in module.named_modules()]
        self.forwards = self._forwards()
        self.hooks: set[int] | None = None
        self.override: Callable | None = None  # our forward on the module, if it has one

    def installed(self, override: Callable | None) -> None:
        """Notes our own hooks and forwards, after they have been put on."""
        self.override, self.hooks, self.forwards = override, self._hooks(), self._forwards()

    def check(self) -> bool:
        """Raises RuntimeError if the module, a layer of it or its forward was replaced or wrapped.

        Returns:
            Whether hooks have been added to its layers, which see the prompt and not the pruned decode steps.
        """
        for name, module in self.places.items():
            try:
                found = self.root.get_submodule(name)
            except AttributeError:
                found = None
            if found is not module:
                self._refuse(name, found)
        inside = list(self.module.named_modules())
        if [(inner, id(part), type(part)) for inner, part in inside] != self.parts:
            before = {inner: (identity, kind) for inner, identity, kind in self.parts}
            changed = [(inner, part) for inner, part in inside if before.get(inner) != (id(part), type(part))]
            inner, part = changed[0] if changed else ("", self.module)
            self._refuse(f"{self.name}.{inner}".rstrip("."), part)
        for inner, part in inside:
            if inner and part.__dict__.get("forward") is not self.forwards[inner]:
                self._refuse(f"{self.name}.{inner}", part, "the forward of ")
        if self.override is not None and not leads_to(self.module, self.override):
            self._refuse(self.name, self.module, "the forward of ")
        new = self.hooks is not None and bool(self._hooks() - self.hooks)
        if new:
            self.hooks |= self._hooks()
        return new

    def _forwards(self) -> dict[str, Callable | None]:
        """Of the layers inside, those that stand in for their own."""
        return {inner: part.__dict__.get("forward") for inner, part in self.module.named_modules() if inner}

    def _hooks(self) -> set[int]:
        """Hooks of the layers inside. Those of the module itself see every call."""
        layers = [part for part in self.module.modules() if part is not self.module]
        return {id(hook) for part in layers for kind in _HOOKS for hook in getattr(part, kind).values()}

    def _refuse(self, name: str, found: nn.Module | None, what: str = "") -> None:
        now = "" if found is None else f" (it is now a {type(found).__name__})"
        if found is not None and what:
            now = f" ({hook_of(found)})" if hook_of(found) else ""
        raise RuntimeError(
            f"{what}{name} was replaced or wrapped while the model was attached{now}: the prompt would use it and "
            "decode would not. Call popmm.detach(model), change it, and attach again"
        )


def leads_to(module: nn.Module, ours: Callable) -> bool:
    """Whether a module's forward is ours, or something around it."""
    found, seen = module.__dict__.get("forward"), 0
    while found is not None and found != ours and seen < 8:
        found, seen = getattr(found, "__wrapped__", None) or forward_below_hooks(module), seen + 1
    return found == ours

"""FFN weights that were freed because decode and prompts read planes, and how they come back."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from popmm.compat import load_again
from popmm.method.ffn import hollow
from popmm.method.fingerprint import fingerprint, same
from popmm.runtime.overrides import Override
from popmm.runtime.site import PrunedSite

REFUSED = (
    "the 16-bit FFN weights of this model were freed (weights='replace'), so {what} would take what is not there: call "
    "popmm.detach(model) first, which reads them again"
)


class FreedWeights:
    """The parameters of all FFNs that decode by planes. Freed, each keeps its shape and dtype and holds one NaN."""

    def __init__(self, model: nn.Module, ffns: list[PrunedSite], shared: set[int]) -> None:
        self.model = model
        self._ffns = [ffn for ffn in ffns if not ffn.sizes.is_dense]
        names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        self._parameters = {names[id(p)]: p for ffn in self._ffns for p in _of(ffn, shared)}
        self._freed: set[str] = set()

    def overrides(self) -> list[Override]:
        """Refusals of what would read the freed weights, or move them without the planes."""
        own = [part for ffn in self._ffns for part in (ffn.site.places.values() or [ffn.site.module])]
        freed = {id(part) for module in own for part in module.modules()}
        # what holds a freed one would convert its other parts before it comes to that
        modules = [m for m in self.model.modules() if any(id(part) in freed for part in m.modules())]
        refused = [(self.model, "save_pretrained")]
        refused += [(module, name) for module in modules for name in ("state_dict", "_apply")]
        return [Override(module, name, self._refusing(getattr(module, name), name)) for module, name in refused]

    def _refusing(self, call: Callable, name: str) -> Callable:
        what = "moving or converting it" if name == "_apply" else f"{name}()"

        @functools.wraps(call)
        def refuse(*args, **kwargs):
            if self._freed:
                raise RuntimeError(REFUSED.format(what=what))
            return call(*args, **kwargs)

        return refuse

    @torch.inference_mode(False)
    @torch.no_grad()
    def free(self) -> None:
        for ffn in self._ffns:
            ffn.keep_norms()
        for name, p in self._parameters.items():
            self._freed.add(name)
            p.data = hollow(p.shape, p.dtype, p.device)
        for ffn in self._ffns:
            ffn.layout.replaced = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self) -> None:
        """Reads the weights again from the files that the model came from. May be called again.

        Raises:
            RuntimeError: they are not there, or are others; the model stays attached, and can be used so.
        """
        if not self._freed:
            return
        source = getattr(self.model, "name_or_path", "") or "nowhere that it remembers"
        hint = "it stays attached and usable so; for the 16-bit weights load the model anew"
        try:
            found = dict(load_again(self.model).named_parameters(remove_duplicate=False))
            read = {name: found[name].data for name in self._freed}
        except Exception as error:
            raise RuntimeError(
                f"weights='replace' freed the FFN weights of this {type(self.model).__name__}, and they could not be "
                f"read again from {source} ({type(error).__name__}: {error}): {hint}"
            ) from error
        before = {name: self._parameters[name].data for name in read}
        for name, data in read.items():
            p = self._parameters[name]
            p.data = data.to(device=p.device, dtype=p.dtype)
        changed = [ffn.name for ffn in self._ffns if not same(ffn.layout.marks, fingerprint(ffn.site.weights()))]
        if changed:
            for name, data in before.items():
                self._parameters[name].data = data
            raise RuntimeError(
                f"weights='replace' freed the FFN weights of this {type(self.model).__name__}, and what {source} holds "
                f"for {changed[0]} is not what was attached (changed after loading?): {hint}"
            )
        for ffn in self._ffns:
            ffn.layout.replaced = False
        self._freed.clear()

    def bytes(self) -> int:
        """Memory of the model's own weights that is free."""
        return sum(self._parameters[name].numel() * self._parameters[name].element_size() for name in self._freed)


def _of(ffn: PrunedSite, shared: set[int]) -> list[nn.Parameter]:
    """The parameters that hold an FFN's gate, up and down.

    Raises:
        ValueError: there are none, or others need them too.
    """
    parameters = dict(ffn.site.module.named_parameters())
    storages = [_storage(w) for w in ffn.site.weights().matrices]
    found = {name: p for name, p in parameters.items() if _storage(p) in storages}
    tied = next((name for name, p in found.items() if id(p) in shared), None)
    if tied is not None:
        raise ValueError(f"weights='replace': {ffn.name} shares {tied} with another module: give weights='keep'")
    if {_storage(p) for p in found.values()} != set(storages):
        raise ValueError(
            f"weights='replace': the weights of {ffn.name} are no parameters of its own (adapted or quantised?): give "
            "weights='keep'"
        )
    return list(found.values())


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()

"""Experts that their module runs by itself, outside of transformers' experts interface, under POP."""

from __future__ import annotations

import torch
from torch import Tensor

from popmm.runtime.experts import PrunedExperts
from popmm.runtime.overrides import Hook, Override
from popmm.runtime.phase import Phase


class PrunedOwnExperts(PrunedExperts):
    """Stacked experts whose module's own forward ours stands in for (``FFNSite.routing``)."""

    def wire(self, phase: Phase, switches_experts: bool) -> None:
        """Remembers whom to ask for the phase, and the module's own forward."""
        self.phase = phase
        self._own = self.site.module.forward
        self.dense_forward = self._by_planes  # of tokens that are routed already
        self._rows = None

    def overrides(self) -> list[Override]:
        return [Override(self.site.module, "forward", self.forward)]

    def hooks(self) -> list[Hook]:
        return []

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Stands in for the module's forward: dense at prefill and by itself, pruned at decode."""
        phase, args = self.phase, (*args, *kwargs.values())
        routing = self.site.routing
        if not (torch.compiler.is_compiling() or phase.running):
            phase.warn_if_unwired()
            return self._dense(args)
        if self.sizes.is_dense or not (phase.decoding or phase.alone is not None):
            return self._dense_or_measured(args)
        x, index, weight = routing.read(*args)
        y = super().forward(x, index, weight)
        return routing.give(y, *args)

    def _dense(self, args: tuple[Tensor, ...]) -> Tensor:
        if not self.replaced:
            return self._own(*args)
        routing = self.site.routing
        return routing.give(self._by_planes(*routing.read(*args)), *args)

    def _dense_or_measured(self, args: tuple[Tensor, ...]) -> Tensor:
        """A pass in which the module's own forward serves, unless a prompt is to be pruned."""
        if self.phase.decoding:
            if self.trace is not None:
                self.record(self.site.routing.read(*args)[1], None)
        elif self.phase.prompt is not None:
            x, index, weight = self.site.routing.read(*args)
            y = self.read(x, index, weight)
            if y is not None:
                return self.site.routing.give(y, *args)
        return self._dense(args)

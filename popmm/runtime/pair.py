"""FFNs that are no module to be called: two stand-ins, for the first projection and for down."""

from __future__ import annotations

from torch import Tensor, nn

from popmm.adapters.weights import BeingRead
from popmm.runtime.dense import PrunedFFN
from popmm.runtime.overrides import Override
from popmm.runtime.phase import Phase


class PrunedPair(PrunedFFN):
    """A dense FFN whose two projections stand somewhere in a block (``FFNSite.entry`` and ``down``)."""

    def wire(self, phase: Phase, switches_experts: bool) -> None:
        first, down, combine = self.site.entry.forward, self.site.down.forward, self.site.combine
        super().wire(phase, switches_experts)
        self._first, self._down = first, down
        self._y: Tensor | None = None  # what down is to hand over
        self.dense_forward = lambda x: self._by_planes(x) if self.replaced else down(combine(first(x), None))

    def overrides(self) -> list[Override]:
        return [Override(self.site.entry, "forward", self.enter), Override(self.site.down, "forward", self.leave)]

    def enter(self, x: Tensor) -> Tensor:
        """Stands in for the first projection: computes what down will hand over.

        What the model's own code makes of the zeros in between is not looked at.
        """
        if BeingRead.active:
            return self._first(x)
        self._y = self.instead(x)
        return self._first(x) if self._y is None else x.new_zeros(*x.shape[:-1], self.sizes.d_ff)

    def observe(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """As of other FFNs; what down was handed by ``enter`` is measured already."""
        return super().observe(module, args) if self._y is None else None

    def leave(self, h: Tensor) -> Tensor:
        """Stands in for down."""
        if BeingRead.active:
            return self._down(h)
        y, self._y = self._y, None
        return self._down(h) if y is None else y

"""Dense FFNs of an attached model: they measure the prompt and compute the pruned decode step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from popmm import kernels
from popmm.kernels.precision import output_dtype
from popmm.method import ffn as arithmetic
from popmm.method.modality import JointStatistics
from popmm.runtime.overrides import Hook, Override
from popmm.runtime.site import PrunedSite

if TYPE_CHECKING:
    from popmm.runtime.phase import Phase


class PrunedFFN(PrunedSite):
    """A dense FFN under POP. ``forward`` and ``observe`` are wired to the model by ``attach``."""

    def wire(self, phase: Phase, switches_experts: bool) -> None:
        """Remembers whom to ask for the phase, and the module's own forward."""
        self.phase = phase
        own = self.site.module.forward
        self.dense_forward = lambda x: self._by_planes(x) if self.replaced else own(x)
        self._x: Tensor | None = None  # input and up projection of the prompt pass in progress
        self._up: Tensor | None = None

    def overrides(self) -> list[Override]:
        return [Override(self.site.module, "forward", self.forward)]

    def hooks(self) -> list[Hook]:
        found = [Hook(self.site.down, self.observe)]
        if self.ranking.wants_up and self.site.up is not None:
            found.append(Hook(self.site.up, self.keep_up, after=True))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Stands in for the module's forward: dense at prefill and by itself, pruned at decode."""
        y = self.instead(x)
        return self.dense_forward(x) if y is None else y

    def instead(self, x: Tensor) -> Tensor | None:
        """What is computed in place of the module's own forward; None where that one serves."""
        phase = self.phase
        if not (torch.compiler.is_compiling() or phase.running):
            phase.warn_if_unwired()
            return self._by_planes(x) if self.replaced else None
        if phase.alone is not None and not self.sizes.is_dense:
            return self.mixed(x)
        if not phase.decoding:
            if phase.prompt is not None and (self.ranking.wants_up or self.replaced):
                return self.read(x)
            return self._by_planes(x) if self.replaced else None
        y, passing = (None, None) if self.sizes.is_dense else self.decode(x)
        if self.trace is not None:
            self.record(x, passing)
        return y

    def read(self, x: Tensor) -> Tensor:
        """Prompt pass of ``gate``, which measures the up projection."""
        if self.replaced:
            return self._by_planes(x, measured=True)
        try:
            self._x = x
            return self.dense_forward(x)
        finally:
            self._x = self._up = None

    def _by_planes(self, x: Tensor, measured: bool = False) -> Tensor:
        """The dense FFN of all that the planes hold."""
        weights = self.weights()
        gate, up = F.linear(x, weights.gate, weights.gate_bias), arithmetic.up_values(x, weights)
        h = self.site.combine(gate, up)
        if measured:
            off = self._measure(h, up)
            h = h if off is None else _without(h, *off)
        return arithmetic.project_down(h, weights)

    def keep_up(self, module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of an up projection that is a layer by itself."""
        if self._x is not None:
            self._up = output.detach()

    def _decode_predicted(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        rows, layout, combine = x.flatten(0, -2), self.layout, self.site.combine
        dtype = output_dtype(self.site.weights().down)
        votes = self.votes(len(rows))
        how = {} if votes is None else {"votes": votes}
        if (votes is not None and not self.phase.simulating) or self.gathers(len(rows)):
            y = layout.step(rows, combine, **how) if self.trace is None and rows.dtype == dtype else None
            if y is not None:
                return y.view(x.shape), None
            y, index = layout.decode(rows, combine, **how)
            passing = self.marked(index) if self.trace is not None else None
        else:
            choose = self.choose if self.phase.simulating else None
            y, passing = layout.decode_all(rows, combine, self.site.weights(), choose, **how)
        return y.view(x.shape).to(dtype), passing

    def decode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pruned FFN of tokens x ``[..., d_model]``.

        Returns:
            The output ``[..., d_model]``, and which of the channels in reading order passed, bool
            ``[..., |R| + |C|]``; None if all did.
        """
        y, passing = self._decode_predicted(x) if self.config.predicts else self._decode_regions(x)
        return (y if self.site.reduce is None else self.site.reduce(y)), passing

    def _decode_regions(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        layout, sizes = self.layout, self.sizes
        linear = F.linear if self.phase.simulating else kernels.linear
        h, passing = arithmetic.hidden(x, layout.padded, self.site.combine, linear)[..., : sizes.read], None
        if self.config.selection == "mask":
            score, norm = self.ranking.score, layout.down_norm
            passing = arithmetic.select(h, score, norm, sizes.retained, sizes.budget, self.choose)
            h = arithmetic.fill_in(h, passing, layout.mean)
        return arithmetic.project_down(h, layout.weights, linear), passing

    def observe(self, module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """Pre-hook of the down projection: measures h of a prompt pass, and prunes it if so configured."""
        prompt = self.phase.prompt
        if self.phase.decoding or prompt is None:
            return None
        (h,) = args
        with torch.inference_mode(False), torch.no_grad():
            up = None
            if self.ranking.wants_up:
                up = self._up if self._up is not None else self._recompute_up()
        factor = None if self.site.factor is None else self.site.factor()
        off = self._measure(h, up, factor)
        return None if off is None else (_without(h, *off),)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _measure(
        self, h: Tensor, up: Tensor | None, factor: Tensor | float | None = None
    ) -> tuple[Tensor, Tensor | float] | None:
        """Adds h and the up projection ``[..., d_ff]`` of a prompt pass to its statistics.

        Args:
            factor: what decode's h has more than this one.

        Returns:
            Places of the channels that the prompt is to do without, and what stands in for them; None = it has all.
        """
        prompt, flat = self.phase.prompt, h.detach().flatten(0, -2)
        if factor is not None:
            flat = flat * factor
        groups = prompt.groups_of(len(flat))
        if not groups:
            return None
        up = None if up is None else up.detach().flatten(0, -2)
        read = {}
        for modality, rows in groups.items():
            own = slice(None) if rows is None else rows.to(h.device)
            read[modality] = self.ranking.measured(flat[own], up=None if up is None else up[own])
        statistics = self.add(prompt, JointStatistics(read))
        if self.config.prefill == "dense" or self.sizes.is_dense or prompt.refreshes:
            return None
        pooled, short = self.ranking.pooled(statistics), self.ranking.is_short(statistics, prompt.all_tokens)
        pruned = self.ranking.split(pooled, statistics.tokens, short).pruned
        mean = 0.0
        if self.config.fill == "mean":
            mean = (pooled.mean[pruned] / (1.0 if factor is None else factor)).to(h.dtype)
        return self.layout.positions(pruned), mean

    def _recompute_up(self) -> Tensor:
        return arithmetic.up_values(self._x.detach(), self.site.read())

    def record(self, x: Tensor, passing: Tensor | None) -> None:
        """Adds a step to the trace: channels that passed, in the model's own numbers."""
        batch, n_tokens = self.phase.shape
        full = torch.zeros(batch * n_tokens, self.sizes.d_ff, dtype=torch.bool, device=x.device)
        order = self.layout_order().to(x.device)
        full[:, order] = True if passing is None else passing.reshape(batch * n_tokens, -1)
        self.trace.add(self.name, full.view(batch, n_tokens, -1).transpose(0, 1))


def _without(h: Tensor, places: Tensor, instead: Tensor | float) -> Tensor:
    h = h.clone()
    h[..., places] = instead
    return h

"""FFNs of an attached model: they measure the prompt and compute the pruned decode step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from popmm.kernels.precision import output_dtype
from popmm.layouts.choose import Layout
from popmm.layouts.traffic import bytes_read
from popmm.method import ffn as arithmetic
from popmm.method.budget import RegionSizes
from popmm.method.fingerprint import IDENTIFYING
from popmm.method.modality import JointStatistics
from popmm.method.partition import FFNPartition
from popmm.runtime.integrity import Integrity
from popmm.runtime.overrides import Hook, Override
from popmm.runtime.ranking import Ranking

if TYPE_CHECKING:
    from popmm.adapters import FFNSite
    from popmm.config import PopConfig
    from popmm.method.ffn import FFNWeights
    from popmm.runtime.phase import Phase
    from popmm.runtime.prompt import PromptPass
    from popmm.runtime.trace import Trace


Choose = Callable[[Tensor, int], Tensor]  # (scores [..., n], k) -> mask of those that pass


class PrunedSite:
    """What FFNs and experts under POP have in common: a partition, a layout, a trace."""

    choose: Choose = staticmethod(arithmetic.best)  # which of the scored channels pass

    def __init__(self, site: FFNSite, sizes: RegionSizes, config: PopConfig, layout: Layout) -> None:
        self.name = site.name
        self.site = site
        self.sizes = sizes
        self.config = config
        self.integrity: Integrity | None = None  # set by attach
        self.identity: Tensor | None = None  # float32 [n], by which a saved sequence knows the model again
        self.origin = ""  # of quantised weights
        self.note = ""  # what a reader must know of the partition's origin
        self.partition: FFNPartition | None = None
        self.stale = False  # the weights were read again since the partition was laid out
        self.trace: Trace | None = None
        self.layout = layout
        self.ranking = Ranking(site, sizes, config, layout)
        self.allocate()

    def allocate(self) -> None:
        """Reads the weights, and makes what the layout keeps of them."""
        source = self.site.read()
        self.layout.allocate(source)
        if self.site.packed is not None:
            self._packed = self.site.packed.identity()
            self.origin = _origin(self.site.packed.kind, self.layout, source)
        gate = self.layout.by_channel(self.layout.marks[0])
        self.identity = gate.flatten()[:IDENTIFYING].to("cpu", copy=True)

    @property
    def replaced(self) -> bool:
        """Whether the weights were freed, and the planes are all there is."""
        return getattr(self.layout, "replaced", False)

    def weights(self) -> FFNWeights:
        """What a prompt is read with: the module's weights, or what the planes hold of them."""
        return self.layout.dequantised(self.site.weights()) if self.replaced else self.site.read()

    def keep_norms(self) -> None:
        """Reads what ranking needs of the weights, before they are freed."""
        self.ranking.prior()

    def check(self) -> bool:
        """Called before each prompt: refuses a module that was replaced, reads weights that have changed again.

        Returns:
            Whether hooks have been added to its layers.
        """
        hooked = self.integrity.check()
        if self.replaced:
            return hooked
        if self.site.packed is not None:
            fits = self._packed == self.site.packed.identity()
        else:
            fits = self.layout.fits(self.site.weights())
        if not fits:
            self.allocate()
            self.ranking.forget_weights()
            self.stale = True
        return hooked

    def marked(self, index: Tensor) -> Tensor:
        """Places in reading order ``[n, K]`` as a mask, bool ``[n, |R| + |C|]``."""
        none = torch.zeros(len(index), self.sizes.read, dtype=torch.bool, device=index.device)
        return none.scatter_(1, index, True)

    def gathers(self, n_tokens: int) -> bool:
        """Whether ``gate`` and ``tiers`` read each token's own rows: in small batches, where that is less than all."""
        return not self.phase.simulating and self.layout.gathers(n_tokens)

    def layout_order(self) -> Tensor:
        """Channels in the order of h at decode, int64 ``[(E,) n]``; all of them if the FFN is left dense."""
        return self.partition.reading_order if self.sizes.is_dense else self.layout.reading_order

    def add(self, prompt: PromptPass, new: JointStatistics) -> JointStatistics:
        """Adds a pass's statistics to what the sequence has; kept by the phase if the pass ends well."""
        known = prompt.statistics.get(self.name) or prompt.sequence.statistics.get(self.name)
        prompt.statistics[self.name] = new if known is None else known + new
        return prompt.statistics[self.name]

    def apply(self, statistics: JointStatistics | None, tokens: int) -> None:
        """Partitions by the statistics and lays the weights out for decode.

        Args:
            statistics: None if the FFN did not run.
            tokens: of the prompt, that the FFN should have been given.
        """
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.layout.norms.device.type, enabled=False):
            ranking = self.ranking
            statistics = ranking.nothing() if statistics is None else statistics
            short = ranking.is_short(statistics, tokens)
            asked = self.config.statistics == "weights"
            self.note = _note(statistics.n_tokens, tokens) if short and not asked else ""
            pooled = ranking.pooled(statistics)
            self.partition, self.stale = ranking.split(pooled, statistics.tokens, short), False
            if self.sizes.is_dense:
                return
            prompt = (pooled.mean, ranking.up_rms(pooled, short)) if ranking.wants_up else (pooled.mean,)
            self.layout.write(self.site.weights(), self.partition, *prompt)

    def release(self) -> None:
        """Frees the layout, after detach."""
        self.layout.release()
        self.ranking.forget_weights()

    def bytes_per_token(self) -> tuple[float, float]:
        """(pruned, dense) weight bytes that one token reads, see ``PartitionState.bytes_per_token``."""
        return bytes_read(self.site, self.sizes, self.config), self.site.active_bytes()


class PrunedFFN(PrunedSite):
    """A dense gated FFN under POP. ``forward`` and ``observe`` are wired to the model by ``attach``."""

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
        phase = self.phase
        if not (torch.compiler.is_compiling() or phase.running):
            phase.warn_if_unwired()
            return self.dense_forward(x)
        if not phase.decoding:
            reads = self.ranking.wants_up and phase.prompt is not None
            return self.read(x) if reads else self.dense_forward(x)
        y, passing = (self.dense_forward(x), None) if self.sizes.is_dense else self.decode(x)
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
        gate = F.linear(x, weights.gate, weights.gate_bias)
        up = F.linear(x, weights.up, weights.up_bias)
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
        if self.gathers(len(rows)):
            y = layout.step(rows, combine) if self.trace is None and rows.dtype == dtype else None
            if y is not None:
                return y.view(x.shape), None
            y, index = layout.decode(rows, combine)
            passing = self.marked(index) if self.trace is not None else None
        else:
            choose = self.choose if self.phase.simulating else None
            y, passing = layout.decode_all(rows, combine, self.site.weights(), choose)
        return y.view(x.shape).to(dtype), passing

    def decode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pruned FFN of tokens x ``[..., d_model]``.

        Returns:
            The output ``[..., d_model]``, and which of the channels in reading order passed, bool
            ``[..., |R| + |C|]``; None if all did.
        """
        if self.config.predicts:
            return self._decode_predicted(x)
        layout, sizes = self.layout, self.sizes
        h, passing = arithmetic.hidden(x, layout.padded, self.site.combine)[..., : sizes.read], None
        if self.config.selection == "mask":
            score, norm = self.ranking.score, layout.down_norm
            passing = arithmetic.select(h, score, norm, sizes.retained, sizes.budget, self.choose)
            h = arithmetic.fill_in(h, passing, layout.mean)
        return arithmetic.project_down(h, layout.weights), passing

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
        weights = self.site.read()
        return F.linear(self._x.detach(), weights.up, weights.up_bias)

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


def _origin(kind: str, layout: Layout, source: FFNWeights) -> str:
    """Where planes of quantised weights come from, and what rounding them again has changed."""
    if layout.sizes.is_dense:
        return ""
    held = layout.dequantised(source)
    off = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(held[:3], source[:3])]
    return f"read from {kind}; rounding it again moves weights by {math.ceil(max(off) * 1000) / 10:.1f}% of their size"


def _note(read: int, tokens: int) -> str:
    if read == 0:
        return "was given no token of the prompt: ranked by its weights' norms"
    return f"was given {read} of the prompt's {tokens} tokens: ranked by them and by its weights' norms"

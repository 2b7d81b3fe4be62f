"""FFNs of an attached model: they measure the prompt and compute the pruned decode step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from popmm import ffn as arithmetic
from popmm.budget import RegionSizes
from popmm.importance import ChannelStatistics, measure, token_score
from popmm.layout import Layout
from popmm.modality import JointStatistics
from popmm.partition import FFNPartition, split
from popmm.traffic import bytes_read

if TYPE_CHECKING:
    from popmm.adapters import FFNSite
    from popmm.config import PopConfig
    from popmm.phase import Phase, PromptPass
    from popmm.trace import Trace


Choose = Callable[[Tensor, int], Tensor]  # (scores [..., n], k) -> mask of those that pass


class PrunedSite:
    """What FFNs and experts under POP have in common: a partition, a layout, a trace."""

    def __init__(self, site: FFNSite, sizes: RegionSizes, config: PopConfig, layout: Layout) -> None:
        self.name = site.name
        self.site = site
        self.sizes = sizes
        self.config = config
        self.score = token_score(config.importance)
        self.partition: FFNPartition | None = None
        self.trace: Trace | None = None
        # what baselines replace: whose statistics alone count, and which scored channels pass
        self.only_modality: str | None = None
        self.choose: Choose = arithmetic.best
        self.layout = layout
        self.layout.allocate(site.weights())

    def refresh(self) -> None:
        """Reads the weights' norms again if the model has moved or its weights have changed."""
        source = self.site.weights()
        if not self.layout.fits(source):
            self.layout.allocate(source)

    @property
    def wants_up(self) -> bool:
        """Whether the prompt pass must measure the up projection too."""
        return self.config.selection == "gate" and not self.sizes.is_dense

    def measured(self, h: Tensor, **how) -> ChannelStatistics:
        """``measure`` of h as it lies, in the model's own channel numbers."""
        found = measure(h, self.score, self.layout.norms, **how)
        by_channel = self.layout.by_channel
        return ChannelStatistics(by_channel(found.squares), by_channel(found.total), found.tokens, found.up_squares)

    def up_rms(self, pooled: ChannelStatistics) -> Tensor:
        """Root mean square of the up projection over the prompt, float32 ``[(E,) d_ff]``."""
        return pooled.up_rms

    def marked(self, index: Tensor) -> Tensor:
        """Places in reading order ``[n, K]`` as a mask, bool ``[n, |R| + |C|]``."""
        none = torch.zeros(len(index), self.sizes.read, dtype=torch.bool, device=index.device)
        return none.scatter_(1, index, True)

    def gathers(self, n_tokens: int) -> bool:
        """Whether ``gate`` reads each token's own rows: in small batches, where that is less than all of U."""
        return not self.phase.simulating and n_tokens * self.sizes.budget <= self.sizes.read

    def layout_order(self) -> Tensor:
        """Channels in the order of h at decode, int64 ``[(E,) n]``; all of them if the FFN is left dense."""
        return self.partition.reading_order if self.sizes.is_dense else self.layout.reading_order

    def importance(self, statistics: ChannelStatistics) -> Tensor:
        """Importance that the partition ranks by, float32 ``[(E,) d_ff]``."""
        return statistics.importance

    def pooled(self, statistics: JointStatistics) -> ChannelStatistics:
        """Statistics that the partition is made from, over all modalities."""
        if self.only_modality in statistics.by_modality:
            return statistics.by_modality[self.only_modality]
        return statistics.pooled(self.config.modality_balance)

    def split(self, pooled: ChannelStatistics, tokens: Mapping[str, Tensor]) -> FFNPartition:
        return split(self.importance(pooled), self.sizes, tokens)

    def add(self, prompt: PromptPass, new: JointStatistics) -> JointStatistics:
        """Adds a pass's statistics to what the sequence has; kept by the phase if the pass ends well."""
        known = prompt.statistics.get(self.name) or prompt.sequence.statistics.get(self.name)
        prompt.statistics[self.name] = new if known is None else known + new
        return prompt.statistics[self.name]

    def apply(self, statistics: JointStatistics) -> None:
        """Partitions by the statistics and lays the weights out for decode."""
        with torch.inference_mode(False), torch.no_grad():
            pooled = self.pooled(statistics)
            self.partition = self.split(pooled, statistics.tokens)
            if self.sizes.is_dense:
                return
            self.refresh()
            prompt = (pooled.mean, self.up_rms(pooled)) if self.wants_up else (pooled.mean,)
            self.layout.write(self.site.weights(), self.partition, *prompt)

    def release(self) -> None:
        """Frees the layout, after detach."""
        self.layout.release()
        self.dense_forward = None

    def bytes_per_token(self) -> tuple[float, float]:
        """(pruned, dense) weight bytes that one token reads, see ``PartitionState.bytes_per_token``."""
        return bytes_read(self.site, self.sizes, self.config), self.site.active_bytes()


class PrunedFFN(PrunedSite):
    """A dense gated FFN under POP. ``forward`` and ``observe`` are wired to the model by ``attach``."""

    def wire(self, phase: Phase) -> None:
        """Remembers whom to ask for the phase, and the module's own forward."""
        self.phase = phase
        self.dense_forward = self.site.module.forward
        self._x: Tensor | None = None  # input and up projection of the prompt pass in progress
        self._up: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Stands in for the module's forward: dense at prefill, pruned at decode."""
        if not self.phase.decoding:
            if self.phase.prompt is not None:
                self.refresh()  # before anything is computed
            return self.read(x) if self.wants_up else self.dense_forward(x)
        y, passing = (self.dense_forward(x), None) if self.sizes.is_dense else self.decode(x)
        if self.trace is not None:
            self.record(x, passing)
        return y

    def read(self, x: Tensor) -> Tensor:
        """Prompt pass of ``gate``, which measures the up projection."""
        try:
            self._x = x
            return self.dense_forward(x)
        finally:
            self._x = self._up = None

    def keep_up(self, module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of an up projection that is a layer by itself."""
        if self._x is not None:
            self._up = output.detach()

    def _decode_gate(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        rows, layout, combine = x.flatten(0, -2), self.layout, self.site.combine
        if self.gathers(len(rows)):
            y, index = layout.decode(rows, combine)
            passing = self.marked(index) if self.trace is not None else None
        else:
            choose = self.choose if self.phase.simulating else None
            y, passing = layout.decode_all(rows, combine, self.site.weights(), choose)
        return y.view(x.shape), passing

    def decode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pruned FFN of tokens x ``[..., d_model]``.

        Returns:
            The output ``[..., d_model]``, and which of the channels in reading order passed, bool
            ``[..., |R| + |C|]``; None if all did.
        """
        if self.config.selection == "gate":
            return self._decode_gate(x)
        layout, sizes = self.layout, self.sizes
        h, passing = arithmetic.hidden(x, layout.padded, self.site.combine)[..., : sizes.read], None
        if self.config.selection == "mask":
            passing = arithmetic.select(h, self.score, layout.down_norm, sizes.retained, sizes.budget, self.choose)
            h = arithmetic.fill_in(h, passing, layout.mean)
        return arithmetic.project_down(h, layout.weights), passing

    def observe(self, module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """Pre-hook of the down projection: measures h of a prompt pass, and prunes it if so configured."""
        prompt = self.phase.prompt
        if self.phase.decoding or prompt is None:
            return None
        (h,) = args
        with torch.inference_mode(False), torch.no_grad():
            flat, up = h.detach().flatten(0, -2), None
            if self.wants_up:
                up = self._up if self._up is not None else self._recompute_up()
                up = up.flatten(0, -2)
            read = {}
            for modality, rows in prompt.groups.items():
                own = slice(None) if rows is None else rows.to(h.device)
                read[modality] = self.measured(flat[own], up=None if up is None else up[own])
            statistics = self.add(prompt, JointStatistics(read))
        if self.config.prefill == "dense" or self.sizes.is_dense or prompt.refreshes:
            return None
        pooled = self.pooled(statistics)
        pruned = self.split(pooled, statistics.tokens).pruned
        h = h.clone()
        mean = pooled.mean[pruned].to(h.dtype) if self.config.fill == "mean" else 0.0
        h[..., self.layout.positions(pruned)] = mean
        return (h,)

    def _recompute_up(self) -> Tensor:
        weights = self.site.weights()
        return F.linear(self._x.detach(), weights.up, weights.up_bias)

    def record(self, x: Tensor, passing: Tensor | None) -> None:
        """Adds a step to the trace: channels that passed, in the model's own numbers."""
        batch, n_tokens = self.phase.shape
        full = torch.zeros(batch * n_tokens, self.sizes.d_ff, dtype=torch.bool, device=x.device)
        order = self.layout_order().to(x.device)
        full[:, order] = True if passing is None else passing.reshape(batch * n_tokens, -1)
        self.trace.add(self.name, full.view(batch, n_tokens, -1).transpose(0, 1))

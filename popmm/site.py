"""FFNs of an attached model: they measure the prompt and compute the pruned decode step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from popmm import ffn as arithmetic
from popmm.budget import RegionSizes
from popmm.importance import ChannelStatistics, measure, token_score
from popmm.layout import CopyLayout
from popmm.modality import JointStatistics
from popmm.partition import FFNPartition, split

if TYPE_CHECKING:
    from popmm.adapters import FFNSite
    from popmm.config import PopConfig
    from popmm.phase import Phase, PromptPass
    from popmm.trace import Trace


class PrunedSite:
    """What FFNs and experts under POP have in common: a partition, a layout, a trace."""

    def __init__(self, site: FFNSite, sizes: RegionSizes, config: PopConfig) -> None:
        self.name = site.name
        self.site = site
        self.sizes = sizes
        self.config = config
        self.score = token_score(config.importance)
        self.partition: FFNPartition | None = None
        self.trace: Trace | None = None
        self.layout = CopyLayout(sizes, fill_mean=config.fill == "mean")
        self.layout.allocate(site.weights())

    def refresh(self) -> None:
        """Reads the weights' norms again if the model has moved or its weights have changed."""
        source = self.site.weights()
        if not self.layout.fits(source):
            self.layout.allocate(source)

    def importance(self, statistics: ChannelStatistics) -> Tensor:
        """Importance that the partition ranks by, float32 ``[(E,) d_ff]``."""
        return statistics.importance

    def pooled(self, statistics: JointStatistics) -> ChannelStatistics:
        return statistics.pooled(self.config.modality_balance)

    def split(self, statistics: JointStatistics) -> FFNPartition:
        return split(self.importance(self.pooled(statistics)), self.sizes, statistics.tokens)

    def add(self, prompt: PromptPass, new: JointStatistics) -> JointStatistics:
        """Adds a pass's statistics to what the sequence has; kept by the phase if the pass ends well."""
        known = prompt.statistics.get(self.name) or prompt.sequence.statistics.get(self.name)
        prompt.statistics[self.name] = new if known is None else known + new
        return prompt.statistics[self.name]

    def apply(self, statistics: JointStatistics) -> None:
        """Partitions by the statistics and lays the weights out for decode."""
        with torch.inference_mode(False), torch.no_grad():
            self.partition = self.split(statistics)
            if self.sizes.is_dense:
                return
            self.refresh()
            self.layout.write(self.site.weights(), self.partition, self.pooled(statistics).mean)

    def release(self) -> None:
        """Frees the layout, after detach."""
        self.layout.release()
        self.dense_forward = None

    def bytes_per_token(self) -> tuple[float, float]:
        """(pruned, dense) weight bytes that one token reads, see ``PartitionState.bytes_per_token``.

        The mask selection needs the down columns of the K channels that pass only:
        ``(2 (|R| + |C|) + K) / 3`` channels.
        """
        s = self.sizes
        channels = (2 * s.read + s.budget) / 3 if self.config.selection == "mask" else s.read
        dense = self.site.active_bytes()
        return channels * (dense // s.d_ff), dense


class PrunedFFN(PrunedSite):
    """A dense gated FFN under POP. ``forward`` and ``observe`` are wired to the model by ``attach``."""

    def wire(self, phase: Phase) -> None:
        """Remembers whom to ask for the phase, and the module's own forward."""
        self.phase = phase
        self.dense_forward = self.site.module.forward

    def forward(self, x: Tensor) -> Tensor:
        """Stands in for the module's forward: dense at prefill, pruned at decode."""
        if not self.phase.decoding:
            return self.dense_forward(x)
        y, passing = (self.dense_forward(x), None) if self.sizes.is_dense else self.decode(x)
        if self.trace is not None:
            self.record(x, passing)
        return y

    def decode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pruned FFN of tokens x ``[..., d_model]``.

        Returns:
            The output ``[..., d_model]``, and which of the channels in reading order passed, bool
            ``[..., |R| + |C|]``; None if all did.
        """
        layout, sizes = self.layout, self.sizes
        h, passing = arithmetic.hidden(x, layout.weights, self.site.combine), None
        if self.config.selection == "mask":
            passing = arithmetic.select(h, self.score, layout.down_norm, sizes.retained, sizes.budget)
            h = arithmetic.fill_in(h, passing, layout.mean)
        return F.linear(h, layout.weights.down, layout.weights.down_bias), passing

    def observe(self, module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """Pre-hook of the down projection: measures h of a prompt pass, and prunes it if so configured."""
        prompt = self.phase.prompt
        if self.phase.decoding or prompt is None:
            return None
        (h,) = args
        self.refresh()
        with torch.inference_mode(False), torch.no_grad():
            flat = h.detach().flatten(0, -2)
            read = {}
            for modality, rows in prompt.groups.items():
                own = flat if rows is None else flat[rows.to(h.device)]
                read[modality] = measure(own, self.score, self.layout.norms)
            statistics = self.add(prompt, JointStatistics(read))
        if self.config.prefill == "dense" or self.sizes.is_dense:
            return None
        pruned = self.split(statistics).pruned
        h = h.clone()
        h[..., pruned] = self.pooled(statistics).mean[pruned].to(h.dtype) if self.config.fill == "mean" else 0.0
        return (h,)

    def record(self, x: Tensor, passing: Tensor | None) -> None:
        """Adds a step to the trace: channels that passed, in the model's own numbers."""
        batch, n_tokens = self.phase.shape
        full = torch.zeros(batch * n_tokens, self.sizes.d_ff, dtype=torch.bool, device=x.device)
        order = self.partition.reading_order.to(x.device)
        full[:, order] = True if passing is None else passing.reshape(batch * n_tokens, -1)
        self.trace.add(self.name, full.view(batch, n_tokens, -1).transpose(0, 1))

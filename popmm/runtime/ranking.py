"""How an FFN's channels are ranked from what was measured of its prompt, and from its weights where too little was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from popmm.method.budget import RegionSizes
from popmm.method.ffn import FFNWeights
from popmm.method.importance import ChannelStatistics, blend_with_prior, measure, token_score
from popmm.method.modality import TEXT, JointStatistics
from popmm.method.partition import FFNPartition, split

if TYPE_CHECKING:
    from popmm.adapters import FFNSite
    from popmm.config import PopConfig
    from popmm.layouts.choose import Layout


class Ranking:
    """From a prompt's statistics to a partition. All values are in the model's own channel numbers.

    An FFN that was given fewer tokens than its prompt has, or none, leans on the norms of its weights ("short"). So do
    experts always: some tokens are all that each is given, and ``blend_with_prior`` weighs their number.
    """

    def __init__(self, site: FFNSite, sizes: RegionSizes, config: PopConfig, layout: Layout) -> None:
        self.site, self.sizes, self.config, self.layout = site, sizes, config, layout
        self.score = token_score(config.importance)
        self._norms: list[Tensor] | None = None  # of gate rows, and of up rows if there are any, as they lie

    @property
    def wants_up(self) -> bool:
        """Whether the prompt pass must measure the up projection too."""
        return self.config.predicts and not self.sizes.is_dense and self.site.weights().up is not None

    def measured(self, h: Tensor, **how) -> ChannelStatistics:
        """``measure`` of h as it lies."""
        found = measure(h, self.score, self.layout.norms, **how)
        by_channel = self.layout.by_channel
        return ChannelStatistics(by_channel(found.squares), by_channel(found.total), found.tokens, found.up_squares)

    def nothing(self) -> JointStatistics:
        """Statistics of no token."""
        like = self.layout.norms
        zeros = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
        tokens = torch.zeros(like.shape[:-1], dtype=torch.int64, device=like.device)
        none = ChannelStatistics(zeros, zeros, tokens, zeros if self.wants_up else None)
        return JointStatistics({TEXT: none})

    def pooled(self, statistics: JointStatistics) -> ChannelStatistics:
        """Statistics that the partition is made from, over all modalities."""
        return statistics.pooled(self.config.modality_balance)

    def is_short(self, statistics: JointStatistics, tokens: int) -> bool:
        """Whether the FFN was given fewer tokens than the ``tokens`` of its prompt; experts, none at all."""
        return statistics.n_tokens < (1 if self.site.is_experts else tokens)

    def importance(self, statistics: ChannelStatistics, short: bool = False) -> Tensor:
        """Importance that the partition ranks by, float32 ``[(E,) d_ff]``."""
        if not (short or self.site.is_experts):
            return statistics.importance
        return blend_with_prior(statistics, self.prior().to(statistics.squares.device), self.config.prior_tokens)

    def up_rms(self, statistics: ChannelStatistics, short: bool = False) -> Tensor:
        """Root mean square of the up projection over the prompt, float32 ``[(E,) d_ff]``."""
        if not (short or self.site.is_experts):
            return statistics.up_rms
        squares = ChannelStatistics(statistics.up_squares, statistics.total, statistics.tokens)
        return blend_with_prior(squares, self.up_prior().to(squares.squares.device), self.config.prior_tokens)

    def split(self, pooled: ChannelStatistics, tokens: Mapping[str, Tensor], short: bool = False) -> FFNPartition:
        return split(self.importance(pooled, short), self.sizes, tokens)

    def prior(self) -> Tensor:
        """A channel's score without a prompt, float32 ``[(E,) d_ff]``: the product of its vectors' norms."""
        return math.prod(self._row_norms()) * self.layout.by_channel(self.layout.norms)

    def up_prior(self) -> Tensor:
        """In place of the up projection's root mean square without a prompt: its rows' norms."""
        return self._row_norms()[1]

    def forget_weights(self) -> None:
        """They have changed, or are to be freed."""
        self._norms = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def _row_norms(self) -> list[Tensor]:
        if self._norms is None:
            self._norms = [self.layout.by_channel(norms) for norms in row_norms(self.site.read())]
        return self._norms


def row_norms(weights: FFNWeights) -> list[Tensor]:
    """Norms of gate rows, and of up rows if there are any, float32 ``[(E,) d_ff]`` each."""
    accumulate = torch.promote_types(weights.gate.dtype, torch.float32)
    rows = [w.detach() for w in (weights.gate, weights.up) if w is not None]
    return [torch.linalg.vector_norm(w, dim=-1, dtype=accumulate).to(torch.float32) for w in rows]

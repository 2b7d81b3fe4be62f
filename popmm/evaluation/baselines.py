"""Baselines of ``popmm eval``: what they replace in an attached model, from outside, for it knows none.

Those that fix a threshold (CATS, TEAL) or a mask (Wanda-sp) beforehand do so on a calibration text.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from popmm.method.budget import RegionSizes, region_sizes
from popmm.method.importance import ChannelStatistics
from popmm.method.modality import JointStatistics
from popmm.runtime.ranking import Ranking
from popmm.runtime.site import PrunedSite
from popmm.state import PartitionState

SAMPLES = 1 << 20  # scores per FFN that a threshold is taken from, at most


def rank_by(state: PartitionState, importance: Callable[[PrunedSite, ChannelStatistics], Tensor | None]) -> None:
    """Replaces how channels are ranked.

    Args:
        importance: from an FFN and its statistics to float32 ``[(E,) d_ff]``, or None for what it ranks by now.
    """

    def replaced(ffn: PrunedSite, own: Callable) -> Callable[[ChannelStatistics], Tensor]:
        def rank(statistics: ChannelStatistics, short: bool = False) -> Tensor:
            found = importance(ffn, statistics)
            return own(statistics, short) if found is None else found

        return rank

    for ffn in state._ffns:
        ffn.ranking.importance = replaced(ffn, ffn.ranking.importance)


def rank_by_modality(state: PartitionState, name: str) -> None:
    """Makes partitions from the tokens of one modality alone, where there are any."""

    def only(ranking: Ranking) -> Callable[[JointStatistics], ChannelStatistics]:
        def pooled(statistics: JointStatistics) -> ChannelStatistics:
            own = statistics.by_modality.get(name)
            return Ranking.pooled(ranking, statistics) if own is None else own

        return pooled

    for ffn in state._ffns:
        ffn.ranking.pooled = only(ffn.ranking)


def random_scores(h: Tensor, down_norm: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    scores = torch.rand(h.shape[-1], generator=generator, dtype=torch.float32, device="cpu")
    return scores.to(h.device).expand_as(h)


def all_candidates(d_ff: int, ffn_ratio: float, candidate_fraction: float) -> RegionSizes:
    return RegionSizes(d_ff, region_sizes(d_ff, ffn_ratio, 0).budget, retained=0, candidate=d_ff)


def by_magnitude(state: PartitionState, read: Callable[[], None]) -> None:
    """A channel's rank without any data: the product of the norms of its vectors."""

    def rank(ffn: PrunedSite, statistics: ChannelStatistics) -> Tensor:
        return ffn.ranking.prior()

    rank_by(state, rank)


def share_experts(state: PartitionState, read: Callable[[], None]) -> None:
    """One partition for all experts of a layer."""

    def rank(ffn: PrunedSite, statistics: ChannelStatistics) -> Tensor | None:
        squares = statistics.squares
        return squares.sum(0, keepdim=True).sqrt().float().expand(squares.shape) if ffn.site.is_experts else None

    rank_by(state, rank)


def by_calibration(state: PartitionState, read: Callable[[], None]) -> None:
    """Wanda-sp: the calibration text's statistics rank the channels of every prompt."""
    totals: dict[str, ChannelStatistics] = {}

    def gather(ffn: PrunedSite, statistics: ChannelStatistics) -> None:
        totals[ffn.name] = totals[ffn.name] + statistics if ffn.name in totals else statistics

    before = {ffn.name: ffn.ranking.importance for ffn in state._ffns}
    rank_by(state, gather)
    read()
    fixed = {name: before[name](total) for name, total in totals.items()}
    rank_by(state, lambda ffn, statistics: fixed[ffn.name])


class Threshold:
    """Passes what scores at least so much, and counts what passed."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.level: Tensor | None = None
        self.passed = self.tokens = 0

    def __call__(self, scores: Tensor, k: int) -> Tensor:
        if self.level is None:  # calibrating: everything passes
            self.seen.append(scores.detach().flatten())
            return torch.ones_like(scores, dtype=torch.bool)
        passing = scores >= self.level
        self.passed, self.tokens = self.passed + int(passing.sum()), self.tokens + passing.shape[:-1].numel()
        return passing

    def settle(self, share: float) -> None:
        """Takes the level that ``share`` of the scores seen reach."""
        scores = torch.cat(self.seen)
        scores = scores[:: max(1, len(scores) // SAMPLES)].sort(descending=True)[0]
        self.level, self.seen = scores[max(0, min(len(scores), round(share * len(scores))) - 1)], []


def thresholds(state: PartitionState, read: Callable[[], None]) -> None:
    """A threshold per FFN, which on the calibration text lets K channels pass on average."""
    for ffn in state._ffns:
        ffn.choose = Threshold()
    read()
    for ffn in state._ffns:
        ffn.choose.settle(ffn.sizes.budget / ffn.sizes.read)


def cats(state: PartitionState, read: Callable[[], None]) -> None:
    """CATS (Lee et al., arXiv 2404.08763): channels whose gate's activation exceeds a threshold."""
    for ffn in state._ffns:
        ffn.layout.score = lambda g, combine, experts: combine(g.float(), torch.ones_like(g.float())).abs()
    thresholds(state, read)

"""How many channels a token reads at which precision: tiers, the best channels in most bits, the worst not at all.

Weights lie in nested planes (``popmm.kernels.planes``): 4 bits for all, 2 more, and 2 more; where few bytes may be
read, 3, 2 and 2. A token reads the first plane of every gate row, which predicts each channel's weight; up rows and
down columns of the ``n`` best channels follow, in 8, 6 or 4 bits by rank (7, 5 or 3), and the gate's own further planes
for those read in more than the first. Of an FFN without a gate the first projection is read as the gate is, and
there are no up rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from popmm.kernels.planes import base_of
from popmm.method.budget import RegionSizes

PLAIN_BITS = 16  # of a weight as it came, in which shares of bytes are told
SCALE_BITS = 16  # per group of a row
FEW_BYTES = {3: 0.21, 2: 0.24}  # by matrices: share below which a first plane of 3 bits serves better than one of 4

# by share of the bytes: shares of the channels read in all the planes' bits, and in two planes' bits; the rest of the
# bytes go to the first plane. Measured by KL on SmolLM2-135M and Gemma-3-270m (docs/quality.md), whose FFNs are gated.
# FFNs without a gate read as many channels in as many bits as gated ones do, at the share that this takes of theirs
SPLITS = {
    3: ((0.0, 0.0, 0.0), (0.13, 0.01, 0.05), (0.167, 0.02, 0.07), (0.20, 0.02, 0.20), (0.21, 0.03, 0.20)),
    4: (
        (0.0, 0.0, 0.0),
        (0.20, 0.0, 0.05),
        (0.25, 0.02, 0.10),
        (0.266, 0.02, 0.20),
        (0.30, 0.06, 0.35),
        (0.328, 0.12, 0.40),
        (0.36, 0.15, 0.60),
        (0.40, 0.25, 0.65),
        (0.516, 1.0, 0.0),
    ),
}
# the same for tokens that choose together: what few of them need is not dropped, for it weighs much with those few
SEVERAL = {
    3: ((0.0, 0.0, 0.0), (0.20, 0.02, 0.12), (0.21, 0.02, 0.15)),
    4: (
        (0.0, 0.0, 0.0),
        (0.266, 0.02, 0.10),
        (0.30, 0.06, 0.18),
        (0.328, 0.07, 0.36),
        (0.36, 0.10, 0.55),
        (0.40, 0.23, 0.57),
        (0.516, 1.0, 0.0),
    ),
}


@dataclass(frozen=True)
class TierSizes(RegionSizes):
    """Sizes of an FFN's tiers, in channels. As regions: all channels are candidates, the budget is what is read."""

    tiers: tuple[tuple[int, int], ...] = ()  # (bits, channels), the best first
    matrices: int = 3  # of the FFN, 2 without a gate

    @property
    def is_dense(self) -> bool:
        return not self.tiers

    @property
    def base(self) -> int:
        """Bits of the planes' first."""
        return base_of(self.tiers[0][0])


def row_bits(bits: int, group: int) -> float:
    """Bits per weight of a row read at a precision, its scales included."""
    return bits + SCALE_BITS / group


def bits_read(sizes: TierSizes, group: int) -> float:
    """Bits per channel and model dimension that a token reads, on average over all ``d_ff`` channels."""
    total = sizes.d_ff * row_bits(sizes.base, group)
    return (total + sum(n * _cost(bits, group, sizes.matrices) for bits, n in sizes.tiers)) / sizes.d_ff


def _cost(bits: int, group: int, matrices: int) -> float:
    """Bits per model dimension of a channel read at a precision, beside its gate row's first plane."""
    return bits - base_of(bits) + (matrices - 1) * row_bits(bits, group)


def tier_sizes(
    d_ff: int, share: float, group: int, weight_bits: int | None = None, tokens: int = 1, matrices: int = 3
) -> TierSizes:
    """Tiers that read ``share`` of the bytes that the FFN has in 16 bits.

    Args:
        weight_bits: all channels in so many bits, whatever the share below 1: a quantised FFN that chooses nothing.
        tokens: how many choose together, and read the same channels.
        matrices: 3, or 2 of an FFN without a gate, whose first projection stands for it.

    Raises:
        ValueError: the gate's first plane alone would take the bytes.
    """
    if share >= 1:
        return TierSizes(d_ff, d_ff, d_ff, 0, matrices=matrices)
    if weight_bits is not None:
        return TierSizes(d_ff, d_ff, 0, d_ff, ((weight_bits, d_ff),), matrices)
    base = 3 if share < FEW_BYTES[matrices] else 4
    whole = matrices * PLAIN_BITS
    left = whole * share - row_bits(base, group)  # bits per channel and model dimension, after the gate
    if round(left / _cost(base, group, matrices) * d_ff) < 1:
        least = row_bits(base, group) / whole
        raise ValueError(
            f"selection='tiers' reads {base} bits of every gate row, {least:.1%} of the FFN's bytes at 16 bits, "
            f"before any channel, and may read {share:.1%}: give bytes={least + 0.02:.2f} or more"
        )
    table = (SPLITS if tokens == 1 else SEVERAL)[base]
    points = [(_share(point, base, group, matrices), *point[1:]) for point in table]
    precisions = (base + 4, base + 2, base)
    tiers = allot(d_ff, left, precisions, between(points, share), lambda bits: _cost(bits, group, matrices))
    return TierSizes(d_ff, sum(n for _, n in tiers), 0, d_ff, tiers, matrices)


def between(points: Sequence[tuple[float, ...]], share: float) -> tuple[float, ...]:
    """What a table ``(share, ...)`` says at a share, between its points."""
    for (low, *before), (high, *after) in itertools.pairwise(points):
        if share <= high:
            t = (share - low) / (high - low)
            return tuple(a + t * (b - a) for a, b in zip(before, after))
    return points[-1][1:]


def allot(
    d_ff: int, left: float, precisions: Sequence[int], wanted: Sequence[float], cost: Callable[[int], float]
) -> tuple[tuple[int, int], ...]:
    """Tiers (bits, channels) that cost what is left, the best first.

    Args:
        left: bits per channel and model dimension.
        wanted: shares of the channels, of all tiers but the last, which gets the rest.
        cost: of a channel read in so many bits, per model dimension.
    """
    counts, free = [], d_ff
    for bits, part in zip(precisions, (*wanted, 1.0)):
        n = max(0, min(free, round(part * d_ff), int(left / cost(bits) * d_ff + 0.5)))
        counts.append((bits, n))
        free, left = free - n, left - n * cost(bits) / d_ff
    return tuple((bits, n) for bits, n in counts if n)


def _share(point: tuple[float, float, float], base: int, group: int, matrices: int) -> float:
    """The share of an FFN's bytes at which it reads the channels of a measured point, in the same bits."""
    share, most, two = point
    if matrices == 3:
        return share
    counts = (base + 4, most), (base + 2, two)
    rest = 3 * PLAIN_BITS * share - row_bits(base, group) - sum(n * _cost(bits, group, 3) for bits, n in counts)
    counts += ((base, rest / _cost(base, group, 3)),)
    read = row_bits(base, group) + sum(n * _cost(bits, group, matrices) for bits, n in counts)
    return read / (matrices * PLAIN_BITS)


def assign(score: Tensor, tiers: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Places ``[n, k]`` of each tier's channels, by falling score ``[n, u]``, rising within a tier."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    parts = order[:, : sum(n for _, n in tiers)].split([n for _, n in tiers], dim=-1)
    return [part.sort(dim=-1)[0] for part in parts]


def together(score: Tensor, votes: Tensor) -> Tensor:
    """Scores ``[..., 1, u]`` by which tokens choose together, of each one's ``[..., n, u]``.

    The sum of their squares, of each token made to sum to its vote ``[..., n]``.
    """
    squares = score.double().square()
    shares = squares / squares.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return (votes.double().unsqueeze(-1) * shares).sum(-2, keepdim=True).float()

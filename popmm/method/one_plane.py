"""Tiers of weights that came in 4 bits: gate and up rows lie in one plane, as they came; down alone has further ones.

The groups of a down projection run along d_ff, across its channels: its columns are rounded again, in nested planes. A
token reads all gate rows, and up rows and down columns of the best channels, these in 8, 6 or 4 bits by rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from popmm.method.tiers import PLAIN_BITS, TierSizes, allot, between, row_bits, tier_sizes

BITS = 4
# by share of the bytes: shares of the channels whose down columns are read in 8 bits, and in 6; what is left goes to
# channels read in 4. Measured by KL (docs/quantised.md)
SPLITS = ((0.0, 0.0, 0.0), (0.21, 0.0, 0.0), (0.25, 0.0, 0.45), (0.3073, 0.0, 1.0), (0.349, 1.0, 0.0))


@dataclass(frozen=True)
class OnePlaneSizes(TierSizes):
    """Sizes of the tiers; the bits of a tier are those of its down columns."""


def bits_read(sizes: OnePlaneSizes, group: int) -> float:
    """Bits per channel and model dimension that a token reads, on average over all ``d_ff`` channels."""
    return row_bits(BITS, group) + sum(n * _cost(bits, group) for bits, n in sizes.tiers) / sizes.d_ff


def one_plane_sizes(d_ff: int, share: float, group: int, weight_bits: int | None = None) -> TierSizes:
    """Tiers that read ``share`` of the bytes that the FFN has in 16 bits.

    Args:
        weight_bits: all channels, down columns in so many bits; 3, 5 and 7 round gate and up again.

    Raises:
        ValueError: the gate rows alone would take the bytes.
    """
    if share >= 1 or (weight_bits or 0) % 2:
        return tier_sizes(d_ff, share, group, weight_bits)
    if weight_bits is not None:
        return OnePlaneSizes(d_ff, d_ff, 0, d_ff, ((weight_bits, d_ff),))
    left = 3 * PLAIN_BITS * share - row_bits(BITS, group)
    if round(left / _cost(BITS, group) * d_ff) < 1:
        least = row_bits(BITS, group) / 3 / PLAIN_BITS
        raise ValueError(
            f"selection='tiers' reads every gate row of these weights, which came in {BITS} bits, {least:.1%} of the "
            f"FFN's bytes at 16 bits, before any channel, and may read {share:.1%}: give bytes={least + 0.02:.2f} or "
            "more"
        )
    tiers = allot(d_ff, left, (8, 6, 4), between(SPLITS, share), lambda bits: _cost(bits, group))
    return OnePlaneSizes(d_ff, sum(n for _, n in tiers), 0, d_ff, tiers)


def _cost(bits: int, group: int) -> float:
    return row_bits(BITS, group) + row_bits(bits, group)

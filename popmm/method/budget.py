"""Sizes of an FFN's regions, in channels."""

from __future__ import annotations

from dataclasses import dataclass

MAX_FFN_RATIO = 0.95


@dataclass(frozen=True)
class RegionSizes:
    """Sizes of an FFN's regions, in channels."""

    d_ff: int
    budget: int  # K, active per token
    retained: int  # |R|
    candidate: int  # |C|

    @property
    def read(self) -> int:
        """Channels whose gate and up rows decode reads: |R| + |C|."""
        return self.retained + self.candidate

    @property
    def pruned(self) -> int:
        return self.d_ff - self.read

    @property
    def is_dense(self) -> bool:
        return self.retained == self.d_ff


def region_sizes(d_ff: int, ffn_ratio: float, candidate_fraction: float) -> RegionSizes:
    """K = (1 - ffn_ratio) d_ff, \\|C\\| = gamma d_ff around the K-th channel, \\|R\\| = K - \\|C\\| // 2."""
    budget = max(1, round((1 - ffn_ratio) * d_ff))
    candidate = min(round(candidate_fraction * d_ff), 2 * min(budget, d_ff - budget))
    return RegionSizes(d_ff, budget, budget - candidate // 2, candidate)


def gate_sizes(
    d_ff: int, ffn_ratio: float, candidate_fraction: float | None, gate_cost: float = 1.0, matrices: int = 3
) -> RegionSizes:
    """Sizes for ``selection="gate"``: U gate rows, K up and down rows, ``(gate_cost U + 2 K) / 3`` of the bytes.

    Of an FFN without a gate, U rows of the first projection and K of down, ``(gate_cost U + K) / 2``.

    Args:
        ffn_ratio: share of the FFN's bytes not to read.
        candidate_fraction: U / d_ff; None = all rows, fewer where few bytes are left (measured).
        gate_cost: bytes of a gate row as it is read, of those of a full one.
        matrices: 3, or 2 without a gate.

    Raises:
        ValueError: the gate rows alone would take the bytes.
    """
    if ffn_ratio == 0:
        return region_sizes(d_ff, 0.0, 0.0)
    share, others = 1 - ffn_ratio, matrices - 1
    width = candidate_fraction
    if width is None:
        width = 1.0 if gate_cost < 1 else _width(share, matrices)
    width = min(1.0, max(width, matrices * share / (others + gate_cost)))  # K is at most U
    candidate = max(1, round(width * d_ff))
    budget = round((matrices * share * d_ff - gate_cost * candidate) / others)
    if budget < 1:
        raise ValueError(
            f"selection='gate' reads {width:.0%} of the {'gate' if matrices == 3 else 'first'} rows, "
            f"{gate_cost * width / matrices:.0%} of the FFN's bytes, before any channel, and may read {share:.0%}: "
            "prune less, or give a smaller candidate_fraction"
        )
    return RegionSizes(d_ff, min(budget, candidate), 0, candidate)


def _width(share: float, matrices: int) -> float:
    """U / d_ff where gate rows are read as they are."""
    if matrices == 2:  # a row more of the first projection costs a whole channel of down
        return min(1.0, 1.2 * share)
    return min(1.0, share + 0.4, max(2 * share - 0.1, share))

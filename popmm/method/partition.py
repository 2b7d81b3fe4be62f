"""Partitions: which channels of an FFN are retained, candidates or pruned for the current prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from popmm.method.budget import RegionSizes


@dataclass(frozen=True, eq=False)
class FFNPartition:
    """The three regions of one FFN's channels, or of each of its experts'.

    Channel numbers are the model's own, int64, sorted by falling importance (ties: lower number first).
    For experts every tensor has a leading dimension ``n_experts``.
    """

    retained: Tensor  # [|R|]
    candidate: Tensor  # [|C|]
    pruned: Tensor  # [|P|]
    importance: Tensor  # [d_ff], float32
    tokens_by_modality: Mapping[str, Tensor]  # int64 [] or [n_experts]: prompt tokens behind the importance
    sizes: RegionSizes

    @property
    def tokens(self) -> Tensor:
        """Prompt tokens behind the importance, int64 ``[]`` or ``[n_experts]``."""
        first, *others = self.tokens_by_modality.values()
        return sum((tokens.to(first.device) for tokens in others), first)

    @property
    def budget(self) -> int:
        """K: channels active per token."""
        return self.sizes.budget

    @property
    def d_ff(self) -> int:
        return self.sizes.d_ff

    @property
    def reading_order(self) -> Tensor:
        """Retained, then candidate channels: what decode reads, ``[|R| + |C|]``."""
        return torch.cat([self.retained, self.candidate], dim=-1)

    def __repr__(self) -> str:
        s = self.sizes
        read = " + ".join(f"{int(tokens.sum())} {name}" for name, tokens in self.tokens_by_modality.items())
        experts = f"{len(self.tokens)} experts, " if self.tokens.ndim else ""
        return (
            f"FFNPartition({experts}d_ff={s.d_ff}: {s.retained} retained, {s.candidate} candidate, "
            f"{s.pruned} pruned; budget {s.budget}; from {read} tokens)"
        )


def split(importance: Tensor, sizes: RegionSizes, tokens: Mapping[str, Tensor]) -> FFNPartition:
    """Splits channels by importance ``[(E,) d_ff]``: the top |R|, the next |C|, the rest."""
    order = importance.argsort(dim=-1, descending=True, stable=True)
    retained, candidate, pruned = order.split([sizes.retained, sizes.candidate, sizes.pruned], dim=-1)
    return FFNPartition(retained, candidate, pruned, importance, tokens, sizes)

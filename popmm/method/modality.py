"""Prompts that mix text with images: statistics are kept by modality and weighed when a partition is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from popmm.method.importance import ChannelStatistics

TEXT = "text"


@dataclass(frozen=True)
class JointStatistics:
    """What an FFN has read of a prompt, by modality (``"text"``, ``"image"``, ``"video"``, ``"audio"``)."""

    by_modality: Mapping[str, ChannelStatistics]

    def __add__(self, other: JointStatistics) -> JointStatistics:
        merged = dict(self.by_modality)
        for name, statistics in other.by_modality.items():
            merged[name] = merged[name] + statistics if name in merged else statistics
        return JointStatistics(merged)

    @property
    def tokens(self) -> dict[str, Tensor]:
        """Tokens read of each modality, int64 ``[]`` or ``[n_experts]``."""
        return {name: statistics.tokens for name, statistics in self.by_modality.items()}

    @property
    def n_tokens(self) -> int:
        """Tokens read, over all modalities and experts."""
        return sum(int(tokens.sum()) for tokens in self.tokens.values())

    @property
    def has_tokens(self) -> bool:
        return any(bool((tokens > 0).any()) for tokens in self.tokens.values())

    def pooled(self, text_share: float | None = None) -> ChannelStatistics:
        """Statistics over all modalities.

        Args:
            text_share: share of the weight that text tokens get together, the other modalities get the
                rest; None = every token weighs the same. Without tokens of both kinds it has no effect.
                Means and token counts are those of the tokens as they are.
        """
        parts = list(self.by_modality.values())
        pooled = sum(parts[1:], parts[0])
        if text_share is None or len(parts) == 1 or TEXT not in self.by_modality:
            return pooled
        n_text = self.by_modality[TEXT].tokens.sum()
        n_other = pooled.tokens.sum().to(n_text.device) - n_text
        text, other = (text_share, n_text), (1 - text_share, n_other)
        shares = {name: text if name == TEXT else other for name in self.by_modality}

        def weighted(read: Callable[[ChannelStatistics], Tensor]) -> Tensor:
            """The weighted mean over tokens, times their number: as if each token had weighed its share."""
            total, weight = torch.zeros_like(pooled.squares), torch.zeros_like(pooled.squares[..., 0])
            for name, part in self.by_modality.items():
                share, n = shares[name]
                per_token = share / n.clamp(min=1).to(total)
                total += per_token * read(part).to(total.device)
                weight += per_token * part.tokens.to(total.device)
            mean = total / torch.where(weight > 0, weight, torch.ones_like(weight)).unsqueeze(-1)
            return mean * pooled.tokens.unsqueeze(-1)

        up_squares = None if pooled.up_squares is None else weighted(lambda part: part.up_squares)
        return ChannelStatistics(weighted(lambda part: part.squares), pooled.total, pooled.tokens, up_squares)


def token_groups(counted: Tensor | None, modalities: Mapping[str, Tensor] | None) -> dict[str, Tensor | None]:
    """Which tokens of a pass are of which modality, padding left out.

    Args:
        counted: bool ``[batch, n_tokens]``; None = all count.
        modalities: bool ``[batch, n_tokens]`` by name, of all modalities but text; None = all is text.

    Returns:
        bool ``[batch * n_tokens]`` by name; None = every token.
    """
    text = counted
    others = {}
    for name, positions in (modalities or {}).items():
        positions = positions if counted is None else positions & counted.to(positions.device)
        if positions.any():
            others[name] = positions.flatten()
            text = ~positions if text is None else text.to(positions.device) & ~positions
    if others and not text.any():
        return others
    return {TEXT: None if text is None else text.flatten(), **others}

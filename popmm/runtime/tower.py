"""Pruning of a vision tower, which reads a picture in one pass and never decodes.

Only the prompt pass's rule of the paper applies (its appendix does so with SAM): each FFN computes its
activations, ranks channels over the pictures of the pass, and leaves the lowest out of its down
projection. This follows the paper for measurements of quality; it saves no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from popmm.method.budget import region_sizes
from popmm.method.ffn import down_norm
from popmm.method.importance import measure, token_score
from popmm.method.partition import FFNPartition, split

if TYPE_CHECKING:
    from popmm.adapters.vlm import TowerFFN
    from popmm.config import PopConfig


class PrunedTowerFFN:
    """An FFN of a vision tower: ``prune`` is a forward pre-hook of its down projection."""

    def __init__(self, ffn: TowerFFN, ratio: float, config: PopConfig) -> None:
        self.name, self.down = ffn.name, ffn.down
        self.sizes = region_sizes(ffn.down.in_features, ratio, candidate_fraction=0.0)
        self.score = token_score(config.importance)
        self.fill_mean = config.fill == "mean"
        self.partition: FFNPartition | None = None

    @torch.no_grad()
    def prune(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if self.sizes.is_dense:
            return None
        (h,) = args
        with torch.inference_mode(False):
            flat = h.detach().flatten(0, -2).clone()
            statistics = measure(flat, self.score, down_norm(self.down.weight.detach()))
            self.partition = split(statistics.importance, self.sizes, {"image": statistics.tokens})
        pruned, h = self.partition.pruned, h.clone()
        h[..., pruned] = statistics.mean[pruned].to(h.dtype) if self.fill_mean else 0.0
        return (h,)


def tower_ratio(ffns: list[TowerFFN], config: PopConfig, limit: float) -> float:
    """Share of channels to prune: ``ffn_ratio``, or what ``pruning_ratio`` of the tower's blocks asks for."""
    if config.ffn_ratio is not None:
        return config.ffn_ratio
    blocks = {ffn.name: ffn.block_weights for ffn in ffns}
    ratio = config.pruning_ratio * sum(blocks.values()) / sum(ffn.weights for ffn in ffns)
    if ratio > limit:
        raise ValueError(
            f"pruning_ratio={config.pruning_ratio} would prune {ratio:.1%} of each FFN of the vision tower; at most "
            f"{limit:.0%} may go: give a smaller one, or vision='dense'"
        )
    return ratio

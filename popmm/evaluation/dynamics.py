"""How channels' ranks move while a model decodes (paper, figure 2): the dense model's own scores, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from popmm.attach import pruned
from popmm.config import PopConfig
from popmm.method.partition import FFNPartition
from popmm.runtime.site import PrunedSite

SAMPLED = 6  # channels whose ranks are followed


@dataclass
class Dynamics:
    """Of one FFN. Ranks count from 0, the most important."""

    prompt_ranks: Tensor  # int64 [d_ff]
    ranks: list[Tensor] = field(default_factory=list)  # by decode step, int64 [d_ff]

    @property
    def overlap(self) -> Tensor:
        """By step, share of the step's top half of channels that is in the prompt's top half."""
        half = len(self.prompt_ranks) // 2
        in_prompt = self.prompt_ranks < half
        return torch.stack([in_prompt[ranks < half].float().mean() for ranks in self.ranks])

    @property
    def sampled_ranks(self) -> Tensor:
        """Ranks of channels spread evenly over the prompt's ranks, the prompt's first, ``[1 + steps, SAMPLED]``."""
        order = self.prompt_ranks.argsort()
        chosen = order[torch.linspace(0, len(order) - 1, SAMPLED, dtype=torch.float64, device=order.device).long()]
        return torch.stack([self.prompt_ranks, *self.ranks])[:, chosen]


@torch.no_grad()
def record(model, inputs: dict[str, Tensor], n_tokens: int) -> dict[str, Dynamics]:
    """Ranks of every dense FFN's channels over the prompt, then at each of ``n_tokens`` greedy dense steps, by name.

    Raises:
        ValueError: the model has experts alone, whose channels are not all computed at each step.
    """
    found: dict[str, Dynamics] = {}
    config = PopConfig(ffn_ratio=0.0)  # dense, and scored at each step
    with pruned(model, config) as state:
        model.generate(**inputs, do_sample=False, max_new_tokens=1)
        partitions: dict[str, FFNPartition] = dict(state.layers)
        ffns = [ffn for ffn in state._ffns if not ffn.site.is_experts]
        if not ffns:
            raise ValueError("--dynamics follows the channels of dense FFNs, and this model has experts alone")
        for ffn in ffns:
            found[ffn.name] = Dynamics(_ranks(partitions[ffn.name].importance))
        handles = [ffn.site.down.register_forward_pre_hook(_scored(ffn, found[ffn.name])) for ffn in ffns]
        try:
            model.generate(**inputs, do_sample=False, max_new_tokens=n_tokens + 1, min_new_tokens=n_tokens + 1)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _scored(ffn: PrunedSite, dynamics: Dynamics):
    def hook(module, args: tuple) -> None:
        (h,) = args
        if ffn.phase.decoding:
            dynamics.ranks.append(_ranks(ffn.ranking.score(h.flatten(0, -2)[0].float(), ffn.layout.norms)))

    return hook


def _ranks(scores: Tensor) -> Tensor:
    return scores.argsort(descending=True, stable=True).argsort().cpu()

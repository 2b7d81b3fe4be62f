"""From a target ratio of a model to the ratio of its FFNs."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig

from popmm.adapters import ModelDescription, describe
from popmm.config import PopConfig
from popmm.method.budget import MAX_FFN_RATIO, RegionSizes, gate_sizes, region_sizes

__all__ = ["MAX_FFN_RATIO", "RegionSizes", "ffn_ratio", "gate_sizes", "ratio_of", "region_sizes"]


def ffn_ratio(
    model: nn.Module | PretrainedConfig,
    pruning_ratio: float,
    *,
    skip_layers: tuple[int, ...] = (),
    shared_experts: str = "dense",
) -> float:
    """Share of each FFN's channels to prune so that ``pruning_ratio`` of the blocks' linear weights go.

    Paper, table 8: ``r_ffn = pruning_ratio / share``, where share is the FFN's part of a decoder block's
    linear weights (attention and FFN; no embeddings, norms, biases or routers). Experts count as far as
    one token activates them; shared experts count on neither side unless they are pruned too. FFNs that are left
    dense, in skipped layers or because of their form, count among the block's weights, not among those that can go:
    the others take over their share.

    Args:
        model: a model (its weights may lie on the meta device) or a configuration.
        pruning_ratio: target, in [0, 1).
        skip_layers: layers left dense, whose share the others take over.
        shared_experts: ``"dense"`` or ``"prune"``.

    Raises:
        ValueError: the target needs an FFN ratio above 0.95; names the largest target that works.
        UnsupportedModelError: no FFN of a known form.
    """
    config = PopConfig(pruning_ratio=pruning_ratio, skip_layers=skip_layers, shared_experts=shared_experts)
    if isinstance(model, PretrainedConfig):
        with torch.device("meta"):
            model = AutoModel.from_config(model)
    return ratio_of(describe(model, probe=False, skip_layers=skip_layers), config)


def ratio_of(description: ModelDescription, config: PopConfig) -> float:
    """FFN ratio that a config asks of a model: its ``ffn_ratio``, or that of its ``pruning_ratio``."""
    skip_layers, pruning_ratio = config.skip_layers, config.pruning_ratio
    if any(index >= len(description.layers) for index in skip_layers):
        raise ValueError(f"skip_layers={skip_layers}: this model has layers 0 to {len(description.layers) - 1}")
    prunable, everything = 0, 0
    for layer in description.layers:
        counted = [site for site in layer.sites if config.shared_experts == "prune" or not site.shared]
        weights = sum(site.active_weights() * site.processes for site in counted)
        everything += weights + layer.attention_weights
        prunable += weights if layer.index not in skip_layers else 0
    if prunable == 0:
        raise ValueError(_why_none(description, config))
    if config.ffn_ratio is not None:
        if config.bytes is not None and config.ffn_ratio > MAX_FFN_RATIO:
            raise ValueError(f"bytes={config.bytes} is too little to decode from: give 0.13 or more, such as 0.25")
        return _check_ffn_ratio(config.ffn_ratio)
    ratio = pruning_ratio * everything / prunable
    if ratio > MAX_FFN_RATIO:
        # rounded down, so that the ratio named here works
        largest = math.floor(MAX_FFN_RATIO * prunable / everything * 1000) / 1000
        dense = f" ({len(description.left_out)} others cannot be pruned)" if description.left_out else ""
        raise ValueError(
            f"pruning_ratio={pruning_ratio} would prune {ratio:.1%} of each FFN{dense}; at most {MAX_FFN_RATIO:.0%} "
            f"may go: give pruning_ratio={largest} or less"
        )
    return ratio


def _why_none(description: ModelDescription, config: PopConfig) -> str:
    """Why no site of a description is to be pruned, and what would work."""
    open_layers = [layer for layer in description.layers if layer.index not in config.skip_layers]
    if any(site.shared for layer in open_layers for site in layer.sites):
        return (
            "of this model's FFNs only shared experts can be pruned, and shared_experts='dense' keeps them: give "
            "shared_experts='prune'"
        )
    return f"skip_layers={config.skip_layers} leaves no FFN to prune: skip fewer layers"


def _check_ffn_ratio(ratio: float) -> float:
    """The ratio, refused above 95 %."""
    if ratio > MAX_FFN_RATIO:
        raise ValueError(
            f"ffn_ratio={ratio} prunes more than {MAX_FFN_RATIO:.0%} of each FFN: give {MAX_FFN_RATIO} or less"
        )
    return ratio

"""Bytes that a decode step reads, and how fast this memory could bring them."""

from __future__ import annotations

from collections.abc import Callable

from popmm.adapters import FFNSite
from popmm.config import PopConfig
from popmm.kernels.twin import group_of
from popmm.layouts.gate import gate_row_bytes
from popmm.method import one_plane, tiers
from popmm.method.budget import RegionSizes, gate_sizes, region_sizes
from popmm.method.one_plane import one_plane_sizes
from popmm.method.tiers import TierSizes, tier_sizes

BEST_OF_EIGHT = 0.75  # K / d_ff from which 8 bits serve better than 4 (measured on four models, docs/quality.md)

LEAST_GROUP = 16  # weights of a row that are worth a scale

SizesRule = Callable[[int, float, float], RegionSizes]  # (d_ff, ffn_ratio, candidate_fraction)


def with_bits(config: PopConfig, sites: list[FFNSite], ratio: float) -> PopConfig:
    """A config whose ``gate_bits`` are settled, the same for all FFNs."""
    if config.selection != "gate" or config.gate_bits is not None:
        return config
    quantisable = all(group_of(site.weights().d_model) >= LEAST_GROUP for site in sites)
    if not quantisable or config.candidate_fraction is not None:
        return config.replace(gate_bits=16)
    weights = sites[0].weights()
    cost = gate_row_bytes(weights, 8) / gate_row_bytes(weights, 16)
    n = len(weights.matrices)
    budget = (n * (1 - ratio) - cost) / (n - 1)
    return config.replace(gate_bits=8 if budget >= BEST_OF_EIGHT else 4)


def sizes_for(
    site: FFNSite, ratio: float, config: PopConfig, rule: SizesRule = region_sizes, tokens: int = 1
) -> RegionSizes:
    """Sizes of a site's regions at an FFN ratio; ``gate`` and ``tiers`` have their own rules, by bytes.

    Args:
        tokens: how many choose together.
    """
    weights = site.weights()
    if config.selection not in ("gate", "tiers"):
        return rule(weights.d_ff, ratio, config.candidate_fraction)
    group = group_of(weights.d_model)
    if group < LEAST_GROUP and (config.selection == "tiers" or config.gate_bits < 16):
        what = "selection='tiers'" if config.selection == "tiers" else f"gate_bits={config.gate_bits}"
        raise ValueError(
            f"{what} quantises groups of 16 weights or more, and {site.name} has d_model={weights.d_model}, which 16 "
            "does not divide: give selection='gate' with gate_bits=16"
        )
    if config.selection == "tiers" and site.packed is not None and site.packed.one_plane:
        return one_plane_sizes(weights.d_ff, 1 - ratio, group, config.weight_bits)
    if config.selection == "tiers":
        matrices = len(weights.matrices)
        return tier_sizes(weights.d_ff, 1 - ratio, group, config.weight_bits, tokens, matrices)
    cost = gate_row_bytes(weights, config.gate_bits) / (weights.gate.element_size() * weights.d_model)
    return gate_sizes(weights.d_ff, ratio, config.candidate_fraction, cost, len(weights.matrices))


def sizes_together(site: FFNSite, ratio: float, config: PopConfig) -> dict[int, RegionSizes]:
    """Sizes for tokens that choose together, by how many they are at the least; of experts each chooses for itself."""
    if config.selection != "tiers" or site.is_experts:
        return {}
    return {2: sizes_for(site, max(ratio - config.more_together, 0.0), config, tokens=2)}


def at_once(site: FFNSite, batch: int) -> float:
    """Bytes of a site that ``batch`` tokens read together, in those of one token.

    A weight that several tokens need is read once. Of E experts, of which each token is sent to k at random,
    ``E (1 - (1 - k / E) ** batch)`` are read.
    """
    share = site.top_k / site.n_experts if site.is_experts else 1.0
    return (1 - (1 - share) ** batch) / share


def bytes_read(
    site: FFNSite, sizes: RegionSizes, config: PopConfig, passing: float | None = None, plain: int | None = None
) -> float:
    """FFN weight bytes that one decoded token reads of a site.

    The mask selection needs the down columns of the K channels that pass only: ``(2 (|R| + |C|) + K) / 3``
    channels; gate the gate rows of |R| + |C|, up and down of K; tiers what ``popmm.method.tiers`` says. Without a gate
    there are the first projection's rows and down's columns.

    Args:
        passing: channels that pass on average, in place of K.
        plain: bytes of a weight that is read as it came; None = of the model's dtype.
    """
    weights, k = site.weights(), sizes.budget if passing is None else passing
    row = weights.d_model * (plain or weights.gate.element_size())
    others = len(weights.matrices) - 1  # of a channel, beside its gate row
    shares = site.active_channels() / sizes.d_ff  # FFNs of this size that a token is sent to
    if sizes.is_dense and site.packed is not None:
        return site.active_bytes()
    if sizes.is_dense:
        return shares * sizes.d_ff * (1 + others) * row
    if isinstance(sizes, TierSizes):
        bits_read = one_plane.bits_read if isinstance(sizes, one_plane.OnePlaneSizes) else tiers.bits_read
        return shares * sizes.d_ff * bits_read(sizes, group_of(weights.d_model)) / 8 * weights.d_model
    if config.selection == "gate":
        own = row if config.gate_bits == 16 else gate_row_bytes(weights, config.gate_bits)
        return shares * (sizes.read * own + k * others * row)
    return shares * (others * sizes.read + (k if config.selection == "mask" else sizes.read)) * row


def channels_computed(site: FFNSite, sizes: RegionSizes, config: PopConfig, passing: float | None = None) -> float:
    """Channels of one token's FFN, or of all the experts that it is sent to, that a decode step computes to the end.

    K with ``mask`` and ``gate``, |R| + |C| with ``keep``, all of a dense FFN. The others are skipped.

    Args:
        passing: channels that pass on average, in place of K.
    """
    if sizes.is_dense:
        return site.active_channels()
    computed = sizes.read if config.selection == "keep" else (sizes.budget if passing is None else passing)
    return computed * site.active_channels() / sizes.d_ff

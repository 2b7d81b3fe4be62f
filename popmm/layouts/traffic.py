"""Bytes that a decode step reads, and how fast this memory could bring them."""

from __future__ import annotations

from collections.abc import Callable

from popmm.adapters import FFNSite
from popmm.config import PopConfig
from popmm.layouts.gate import gate_group, gate_row_bytes
from popmm.method.budget import RegionSizes, gate_sizes, region_sizes

BEST_OF_EIGHT = 0.75  # K / d_ff from which 8 bits serve better than 4 (measured on four models, docs/quality.md)

SizesRule = Callable[[int, float, float], RegionSizes]  # (d_ff, ffn_ratio, candidate_fraction)


def with_bits(config: PopConfig, sites: list[FFNSite], ratio: float) -> PopConfig:
    """A config whose ``gate_bits`` are settled, the same for all FFNs."""
    if config.selection != "gate" or config.gate_bits is not None:
        return config
    quantisable = all(gate_group(site.weights().d_model) >= 16 for site in sites)
    if not quantisable or config.candidate_fraction is not None:
        return config.replace(gate_bits=16)
    weights = sites[0].weights()
    cost = gate_row_bytes(weights, 8) / gate_row_bytes(weights, 16)
    budget = (3 * (1 - ratio) - cost) / 2
    return config.replace(gate_bits=8 if budget >= BEST_OF_EIGHT else 4)


def sizes_for(site: FFNSite, ratio: float, config: PopConfig, rule: SizesRule = region_sizes) -> RegionSizes:
    """Sizes of a site's regions at an FFN ratio; ``gate`` has its own rule, by bytes."""
    weights = site.weights()
    if config.selection != "gate":
        return rule(weights.d_ff, ratio, config.candidate_fraction)
    full = weights.gate.element_size() * weights.d_model
    if config.gate_bits < 16 and gate_group(weights.d_model) < 16:
        raise ValueError(
            f"gate_bits={config.gate_bits} quantises groups of 16 weights or more, and {site.name} has d_model="
            f"{weights.d_model}, which 16 does not divide: give gate_bits=16"
        )
    cost = gate_row_bytes(weights, config.gate_bits) / full
    return gate_sizes(weights.d_ff, ratio, config.candidate_fraction, cost)


def bytes_read(site: FFNSite, sizes: RegionSizes, config: PopConfig, passing: float | None = None) -> float:
    """FFN weight bytes that one decoded token reads of a site.

    The mask selection needs the down columns of the K channels that pass only: ``(2 (|R| + |C|) + K) / 3``
    channels; gate the gate rows of |R| + |C|, up and down of K.

    Args:
        passing: channels that pass on average, in place of K.
    """
    weights, k = site.weights(), sizes.budget if passing is None else passing
    if config.selection == "gate" and not sizes.is_dense:
        gates = sizes.read * gate_row_bytes(weights, config.gate_bits)
        rest = k * weights.bytes_per_channel() * 2 / 3
        return (gates + rest) * site.active_channels() / sizes.d_ff
    channels = (2 * sizes.read + k) / 3 if config.selection == "mask" else sizes.read
    return channels * (site.active_bytes() // sizes.d_ff)


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

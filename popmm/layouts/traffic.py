"""Bytes that a decode step reads, and how fast this memory could bring them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from popmm.adapters import FFNSite, describe
from popmm.method.budget import RegionSizes, gate_sizes, region_sizes
from popmm.config import PopConfig
from popmm.layouts.gate import gate_group, gate_row_bytes

COPIED = 1 << 28  # elements of the copy that measures the memory's bandwidth


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


def at_once(site: FFNSite, batch: int) -> float:
    """Bytes of a site that ``batch`` tokens read together, in those of one token.

    A weight that several tokens need is read once. Of E experts, of which each token is sent to k at random,
    ``E (1 - (1 - k / E) ** batch)`` are read.
    """
    share = site.top_k / site.n_experts if site.is_experts else 1.0
    return (1 - (1 - share) ** batch) / share


def dense_ffn_bytes(model, batch: int) -> int:
    """FFN bytes that a dense decode step of ``batch`` tokens reads."""
    return round(sum(site.active_bytes() * at_once(site, batch) for site in describe(model, probe=False).sites()))


def pruned_ffn_bytes(state, batch: int) -> int:
    """FFN bytes that a pruned decode step reads. ``gate`` in large batches reads all up and down rows."""
    total = sum(site.active_bytes() * at_once(site, batch) for site in state._left_dense)
    for ffn in state._ffns:
        own, everything = ffn.bytes_per_token()
        if batch > 1 and ffn.wants_up and not ffn.gathers(batch):
            own = everything
        elif batch > 1 and ffn.wants_up:  # each token has its own rows
            own = min(own * batch / at_once(ffn.site, batch), everything)
        total += own * at_once(ffn.site, batch)
    return round(total)


def other_bytes(model) -> int:
    """Bytes of all weights that a decoded token reads outside the FFNs: attention, routers, output layer."""
    description = describe(model, probe=False)
    size = sum(p.numel() * p.element_size() for p in description.decoder.parameters())
    sites = sum(
        site.weights().bytes_per_channel() * site.weights().d_ff * max(site.n_experts, 1)
        for site in {id(site.module): site for site in description.sites()}.values()  # layers may share one
    )
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    return size - sites - embedding.numel() * embedding.element_size() + head.numel() * head.element_size()


def int8_saving(model) -> tuple[int, int]:
    """Bytes per step that ``quantised_copy`` saves, of the FFNs and of all weights."""
    description = describe(model, probe=False)
    linear = {id(m): m for m in description.decoder.modules() if isinstance(m, torch.nn.Linear)}
    head = model.get_output_embeddings()
    linear[id(head)] = head
    ffns = [site for site in description.sites() if not site.is_experts]
    ffn = sum(site.active_bytes() - site.active_bytes() // site.weights().gate.element_size() for site in ffns)
    return ffn, sum(m.weight.numel() * (m.weight.element_size() - 1) for m in linear.values())


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, in GB, that copying a large tensor reads and writes."""
    n = COPIED if device.type == "cuda" else COPIED // 8
    source = torch.ones(n, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n * 4 / min(times) / 1e9

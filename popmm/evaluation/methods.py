"""Ways to choose channels that ``popmm eval`` compares, each a setting of the library's own parts, or a baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from popmm.adapters import describe
from popmm.budget import ratio_of
from popmm.config import PopConfig
from popmm.evaluation import baselines
from popmm.kernels.planes import rounded
from popmm.kernels.twin import GROUP, group_of
from popmm.layouts.traffic import SizesRule, at_once, bytes_read, sizes_for, with_bits
from popmm.method.budget import region_sizes
from popmm.method.tiers import PLAIN_BITS
from popmm.state import PartitionState

PLAIN = PLAIN_BITS // 8  # bytes of a weight in 16 bits, of which shares are told whatever the model's dtype


@dataclass(frozen=True)
class Method:
    """How to configure an attached model, and what to replace in it."""

    config: Callable[[PopConfig], PopConfig] = lambda c: c
    sizes: SizesRule = region_sizes
    prepare: Callable[[PartitionState, Callable[[], None]], None] | None = None  # (state, reads the calibration text)
    calibrated: bool = False
    experts_only: bool = False
    weight_bits: int | None = None  # no pruning: all FFN weights rounded to so many bits
    fixed: bool = False  # reads the same at any ratio, and so is one row


def _in_planes(bits: int) -> Callable[[PopConfig], PopConfig]:
    return lambda c: c.replace(selection="tiers", candidate_fraction=None, weight_bits=bits)


METHODS: dict[str, Method] = {
    "random": Method(
        lambda c: c.replace(
            selection="keep", candidate_fraction=0.0, importance=baselines.random_scores, prior_tokens=0.0
        )
    ),
    "magnitude": Method(lambda c: c.replace(selection="keep", candidate_fraction=0.0), prepare=baselines.by_magnitude),
    "Wanda-sp": Method(
        lambda c: c.replace(selection="keep", candidate_fraction=0.0), prepare=baselines.by_calibration, calibrated=True
    ),
    "prompt mask": Method(lambda c: c.replace(selection="keep", candidate_fraction=0.0)),
    "GRIFFIN": Method(lambda c: c.replace(selection="keep", candidate_fraction=0.0, importance="griffin")),
    "mask": Method(lambda c: c.replace(selection="mask")),
    "keep": Method(lambda c: c.replace(selection="keep")),
    "CATS": Method(
        lambda c: c.replace(selection="gate", candidate_fraction=1.0, gate_bits=16),
        prepare=baselines.cats,
        calibrated=True,
    ),
    "TEAL": Method(
        lambda c: c.replace(selection="mask", importance=lambda h, down_norm: h.abs()),
        baselines.all_candidates,
        baselines.thresholds,
        calibrated=True,
    ),
    "all re-scored": Method(lambda c: c.replace(selection="mask"), baselines.all_candidates),
    "gate": Method(lambda c: c.replace(selection="gate", candidate_fraction=None, gate_bits=None)),
    "gate, 16 bit": Method(lambda c: c.replace(selection="gate", gate_bits=16)),
    "gate, 8 bit": Method(lambda c: c.replace(selection="gate", candidate_fraction=None, gate_bits=8)),
    "gate, 4 bit": Method(lambda c: c.replace(selection="gate", candidate_fraction=None, gate_bits=4)),
    "mask, experts share a partition": Method(
        lambda c: c.replace(selection="mask"), prepare=baselines.share_experts, experts_only=True
    ),
    "mask, prior for unseen experts only": Method(
        lambda c: c.replace(selection="mask", prior_tokens=0.0), experts_only=True
    ),
    "tiers": Method(lambda c: c.replace(selection="tiers", candidate_fraction=None)),
    **{f"all channels at {bits} of the planes' bits": Method(_in_planes(bits), fixed=True) for bits in (8, 6, 4)},
    **{f"weights at int{bits}": Method(weight_bits=bits, fixed=True) for bits in (8, 6, 5, 4, 3)},
}


def methods_for(model) -> list[str]:
    """Names of the methods that apply to a model."""
    sites = list(describe(model, probe=False).sites())
    has_experts = any(site.is_experts for site in sites)
    in_groups = all(group_of(site.weights().d_model) >= 16 for site in sites)
    found = {name: method for name, method in METHODS.items() if has_experts or not method.experts_only}
    return [name for name, m in found.items() if in_groups or not m.fixed or m.weight_bits is not None]


def check_known(names: list[str]) -> None:
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}: give some of {', '.join(map(repr, METHODS))}")


def fit(model, method: Method, base: PopConfig, share: float) -> float | None:
    """FFN ratio at which a method reads ``share`` of the bytes that the FFNs have in 16 bits.

    Returns:
        None if the method cannot read so little; the least ratio there is if it never reads so much.
    """
    description = describe(model, probe=False)

    def read(ratio: float) -> float:
        config = with_bits(method.config(base.replace(ffn_ratio=ratio)), list(description.sites()), ratio)
        ratio_of(description, config)
        pruned = dense = 0.0
        for site in {site.name: site for site in description.sites()}.values():
            everything = site.active_weights() * PLAIN
            left = site.layer in config.skip_layers or (site.shared and config.shared_experts == "dense")
            sizes = sizes_for(site, ratio, config, method.sizes)
            pruned += everything if left else bytes_read(site, sizes, config, plain=PLAIN)
            dense += everything
        return pruned / dense

    def reads_more(ratio: float) -> bool:
        try:
            return read(ratio) > share
        except ValueError:  # gate: the gate rows alone are more
            return False

    low, high = 1e-6, 0.95
    if reads_more(high):
        return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if reads_more(middle) else (low, middle)
    try:
        read(high)
    except ValueError:
        return None
    return high


def share_read(state: PartitionState, batch: int = 1) -> float:
    """Share of the FFNs' bytes at 16 bits that a step of a batch read; of thresholds, by what passed."""
    dense = sum(site.active_weights() * PLAIN * at_once(site, batch) for site in state._left_dense)
    pruned = float(dense)
    for ffn in state._ffns:
        counts = isinstance(ffn.choose, baselines.Threshold) and ffn.choose.tokens
        passing = ffn.choose.passed / ffn.choose.tokens if counts else None
        pruned += ffn.bytes_per_step(batch, passing, plain=PLAIN)
        dense += ffn.site.active_weights() * PLAIN * at_once(ffn.site, batch)
    every = state.config.refresh_every
    return (every * pruned / dense + 1) / (every + 1) if every else pruned / dense


@contextmanager
@torch.no_grad()
def quantised_ffns(model, bits: int) -> Iterator[float]:
    """Rounds all FFN weights to nearest, in groups of 64 inputs, for the length of a block.

    Yields:
        The share of the FFNs' bytes that is left, scales of 16 bits included.
    """
    weights = [w for site in describe(model, probe=False).sites() for w in site.weights().matrices]
    kept = [w.detach().clone() for w in weights]
    try:
        left = 0.0
        for w in weights:
            w.detach().copy_(_rounded(w.detach(), bits))
            left += w.numel() * bits / 8 + w.numel() / w.shape[-1] * -(-w.shape[-1] // GROUP) * 2
        yield left / sum(w.numel() * PLAIN for w in weights)
    finally:
        for w, before in zip(weights, kept):
            w.detach().copy_(before)


def _rounded(w: Tensor, bits: int) -> Tensor:
    d = w.shape[-1]
    rows = F.pad(w.float().reshape(-1, d), (0, -d % GROUP))
    return rounded(rows, bits, GROUP)[:, :d].reshape(w.shape).to(w.dtype)

"""Every kernel in plain torch: what the others are tested against, and what runs where they do not."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from popmm.kernels.precision import without_autocast


def gather_dot(rows: Tensor, index: Tensor, x: Tensor) -> Tensor:
    with without_autocast(rows.device):
        return torch.einsum("nkd,nd->nk", rows[index].float(), x.float())


def gather_sum(rows: Tensor, index: Tensor, h: Tensor) -> Tensor:
    with without_autocast(rows.device):
        return torch.einsum("nkd,nk->nd", rows[index].float(), h.float())


def block_dot(matrices: Tensor, x: Tensor, block: Tensor) -> Tensor:
    with without_autocast(matrices.device):
        return torch.einsum("nrd,nd->nr", matrices[block].float(), x.float())


def quantised_dot(codes: Tensor, scale: Tensor, x: Tensor, bits: int, group: int, block: Tensor, n_rows: int) -> Tensor:
    rows = dequantise(codes, scale, bits, group).view(-1, n_rows, x.shape[1])
    with without_autocast(x.device):
        return x.float() @ rows[0].mT if len(rows) == 1 else torch.einsum("nrd,nd->nr", rows[block], x.float())


def choose(score: Tensor, k: int) -> Tensor:
    if not 0 <= k <= score.shape[1]:
        raise ValueError(f"the k={k} highest of scores of shape {tuple(score.shape)}: give k at most u of [n, u]")
    order = score.argsort(dim=-1, descending=True, stable=True)
    return order[:, :k].sort(dim=-1)[0]


GROUP = 64  # weights of a row that share a scale, along d_model


def group_of(d_model: int) -> int:
    """Group size of quantised rows: 64, or what of it divides ``d_model``."""
    return math.gcd(GROUP, d_model)


# scales that are tried, of a group's weight of largest magnitude: it becomes -8, is clipped to -8, or becomes 7
SCALES_4_BIT = (-1 / 8, -0.92 / 8, 1 / 7)
ROWS_AT_ONCE = 1 << 22  # weights quantised together, which bounds the memory that this takes


def quantise(rows: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Round to nearest, one scale per group of a row: of a few scales the one with the least squared error.

    Args:
        rows: ``[n, d]``, d a multiple of ``group``.

    Returns:
        codes, int8 ``[n, d]`` for 8 bits, uint8 ``[n, d / 2]`` for 4 (the first half of a group in the low
        nibbles, the second half in the high ones, 8 added); and scales, float16 ``[n, d / group]``, of either sign
        for 4 bits.
    """
    n, d = rows.shape
    step = max(1, ROWS_AT_ONCE // d)
    with without_autocast(rows.device):
        parts = [_quantise(rows[start : start + step], bits, group) for start in range(0, n, step)]
        codes, scales = zip(*parts)
        return torch.cat(codes), torch.cat(scales)


def _quantise(rows: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    n, d = rows.shape
    parts = rows.float().view(n, d // group, group)
    highest = 2 ** (bits - 1) - 1
    if bits == 8:
        scale = as_half(parts.abs().amax(-1) / highest)
        return codes_of(parts, scale, bits).to(torch.int8).view(n, d), scale
    extreme = extreme_of(parts)
    scale = best_scale(parts, bits, (as_half(factor * extreme) for factor in SCALES_4_BIT))
    low, high = (codes_of(parts, scale, bits) + 8).to(torch.uint8).chunk(2, dim=-1)
    return (low | (high << 4)).reshape(n, d // 2), scale


def extreme_of(parts: Tensor) -> Tensor:
    """Each group's weight of largest magnitude ``[...]``, of groups ``[..., group]``.

    Codes reach one further down than up, so the sign of the scale decides which side has the further one.
    """
    return parts.gather(-1, parts.abs().argmax(-1, keepdim=True)).squeeze(-1)


def best_scale(parts: Tensor, bits: int, scales: Iterable[Tensor]) -> Tensor:
    """Of some scales of each group of weights ``[..., group]`` the one of least squared error, the first of equals."""
    best = least = None
    for scale in scales:
        error = (codes_of(parts, scale, bits) * scale.float().unsqueeze(-1) - parts).square().sum(-1)
        if best is None:
            best, least = scale, error
            continue
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def check_finite(weights: Tensor, whose: str, instead: str) -> None:
    """Refuses to quantise what is no number, with what to give instead."""
    if not all(torch.isfinite(own).all() for own in (weights if weights.ndim == 3 else (weights,))):
        raise ValueError(
            f"{whose} weights that are no finite numbers, which cannot be quantised: mend the checkpoint, or give "
            f"{instead}"
        )


def as_half(scale: Tensor) -> Tensor:
    """float16, away from zero and from infinity."""
    size = scale.abs().clamp(6e-8, 65504.0).half()
    return torch.where(scale < 0, -size, size)


def codes_of(parts: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Weights ``[..., group]`` as the nearest whole numbers of a scale that so many bits hold."""
    highest = 2 ** (bits - 1) - 1
    return (parts / scale.float().unsqueeze(-1)).round().clamp(-highest - 1, highest)


def dequantise(codes: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    """Rows of ``quantise``, float32 ``[n, d]``."""
    n, groups = scale.shape
    if bits == 4:
        packed = codes.view(n, groups, group // 2)
        with without_autocast(codes.device):
            codes = torch.cat([packed & 15, packed >> 4], dim=-1).to(torch.int8) - 8
    return (codes.view(n, groups, group).float() * scale.float().unsqueeze(-1)).view(n, groups * group)

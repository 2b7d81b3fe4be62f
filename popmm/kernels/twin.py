"""Every kernel in plain torch: what the others are tested against, and what runs where they do not."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_dot(rows: Tensor, index: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("nkd,nd->nk", rows[index].float(), x.float())


def gather_sum(rows: Tensor, index: Tensor, h: Tensor) -> Tensor:
    return torch.einsum("nkd,nk->nd", rows[index].float(), h.float())


def block_dot(matrices: Tensor, x: Tensor, block: Tensor) -> Tensor:
    return torch.einsum("nrd,nd->nr", matrices[block].float(), x.float())


def quantised_dot(codes: Tensor, scale: Tensor, x: Tensor, bits: int, group: int, block: Tensor, n_rows: int) -> Tensor:
    rows = dequantise(codes, scale, bits, group).view(-1, n_rows, x.shape[1])
    return x.float() @ rows[0].mT if len(rows) == 1 else torch.einsum("nrd,nd->nr", rows[block], x.float())


def choose(score: Tensor, k: int) -> Tensor:
    order = score.argsort(dim=-1, descending=True, stable=True)
    return order[:, :k].sort(dim=-1)[0]


def quantise(rows: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Round to nearest, one scale per group of a row.

    Args:
        rows: ``[n, d]``, d a multiple of ``group``.

    Returns:
        codes, int8 ``[n, d]`` for 8 bits, uint8 ``[n, d / 2]`` for 4 (the first half of a group in the low
        nibbles, the second half in the high ones, 8 added); and scales, float16 ``[n, d / group]``.
    """
    n, d = rows.shape
    parts = rows.float().view(n, d // group, group)
    highest = 2 ** (bits - 1) - 1
    scale = (parts.abs().amax(-1) / highest).half().clamp(min=6e-8)
    codes = (parts / scale.float().unsqueeze(-1)).round().clamp(-highest - 1, highest)
    if bits == 8:
        return codes.to(torch.int8).view(n, d), scale
    low, high = (codes + 8).to(torch.uint8).chunk(2, dim=-1)
    return (low | (high << 4)).reshape(n, d // 2), scale


def dequantise(codes: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    """Rows of ``quantise``, float32 ``[n, d]``."""
    n, groups = scale.shape
    if bits == 4:
        packed = codes.view(n, groups, group // 2)
        codes = torch.cat([packed & 15, packed >> 4], dim=-1).to(torch.int8) - 8
    return (codes.view(n, groups, group).float() * scale.float().unsqueeze(-1)).view(n, groups * group)

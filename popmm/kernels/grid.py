"""Weights that came in 4 bits: the grid they lie on is found again, and their own codes are kept in one plane.

A group of weights lies on a grid if all are whole multiples, from -8 to 7, of one number: so symmetric quantisers with
groups along the row (GPTQ with ``sym``, compressed-tensors, torchao) leave them, whatever their packing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from popmm.kernels.planes import Planes, packed_codes
from popmm.kernels.precision import without_autocast
from popmm.kernels.twin import ROWS_AT_ONCE, as_half, codes_of, extreme_of, group_of

# steps that a group's weight of largest magnitude may be away from 0; whatever its sign, for the step has one too
MULTIPLES = (-8, 7, 6, 5, 4, 3, 2, 1)
OFF = 0.05  # steps that a weight may lie beside the grid: bfloat16 has it up to 8 / 2^9 off, and the step too
SAMPLE = 64  # rows that are looked at before all


def on_grid(rows: Tensor) -> bool:
    """Whether all groups of rows ``[..., d]``, of 64 weights or what of it divides d, lie on a 4-bit grid each."""
    flat = rows.detach().flatten(0, -2)
    every = max(1, len(flat) // SAMPLE)
    if _steps(flat[::every]) is None:
        return False
    step = max(1, ROWS_AT_ONCE // flat.shape[1])
    return all(_steps(flat[start : start + step]) is not None for start in range(0, len(flat), step))


def encode_grid(rows: Tensor) -> Planes:
    """Rows ``[n, d]`` that are ``on_grid``, in one plane of 4 bits: their codes, with the steps in 16 bits.

    Raises:
        ValueError: they are not.
    """
    step = max(1, ROWS_AT_ONCE // rows.shape[1])
    parts = [_encode(rows[start : start + step].detach()) for start in range(0, len(rows), step)]
    return Planes(*map(torch.cat, zip(*parts)))


def _encode(rows: Tensor) -> Planes:
    found = _steps(rows)
    if found is None:
        raise ValueError("weights lie on no 4-bit grid any more: detach, and attach again")
    groups, step = found
    with without_autocast(rows.device):
        code = codes_of(groups, step, 4)
        # the step was found from one weight, which may have come rounded to 16 bits: all together tell it better
        fitted = as_half((code * groups).sum(-1) / code.square().sum(-1).clamp_min(1))
        u = (code + 8).to(torch.uint8)
    none = torch.empty(len(rows), 0, dtype=torch.uint8, device=rows.device)
    return Planes(packed_codes(u), none, none, fitted)


def _steps(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Groups ``[n, groups, group]``, float32, and the step of each; None if one has none."""
    n, d = rows.shape
    group = group_of(d)
    with without_autocast(rows.device):
        groups = rows.float().reshape(-1, group)
        extreme = extreme_of(groups)
        step, left = torch.ones_like(extreme), extreme.nonzero().squeeze(1)
        for multiple in MULTIPLES:
            tried = extreme[left] / multiple
            parts = groups[left] / tried.unsqueeze(-1)
            fits = (parts - parts.round().clamp_(-8, 7)).abs().amax(-1) <= OFF
            step[left[fits]] = tried[fits]
            left = left[~fits]
            if not len(left):
                return groups.view(n, -1, group), step.view(n, -1)
    return None

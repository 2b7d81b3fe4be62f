"""Weights in nested planes: 4 bits of every weight, 2 more, and 2 more, with one scale per group of a row.

A weight w in a group of scale s is ``code = round(w / s)`` in [-8, 7], and where it lies within the code's cell:
``fine`` tells the quarter, ``finest`` the quarter of the quarter. With 4, 6 or 8 bits read it is taken to lie in the
middle of its cell, so that each precision is centred by itself. In one number,
``u = (code + 8) * 2^(bits - 4) + cell``, and the value is ``s * (u - MIDDLE[bits]) / 2^(bits - 4)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from popmm.kernels.precision import without_autocast
from popmm.kernels.twin import ROWS_AT_ONCE, as_half, best_scale, codes_of, extreme_of, group_of

# scales that are tried: the group's weight of largest magnitude becomes this code (or is clipped to the last one)
CODES_OF_EXTREME = (-8.0, -7.6, -7.2, -6.8, -6.24, 7.0, 6.5, 6.0)
BASE_BITS = 4  # of the first plane
MIDDLE = {4: 8.0, 6: 33.5, 8: 135.5}


class Planes(NamedTuple):
    """Rows ``[n, d]``."""

    base: Tensor  # uint8 [n, d / 2], 8 more than the codes: the first half of a group in the low nibbles
    fine: Tensor  # uint8 [n, d / 4]: the k-th quarter of a group in the k-th pair of bits
    finest: Tensor  # the same
    scale: Tensor  # float16 [n, d / group], of either sign

    @property
    def group(self) -> int:
        return 2 * self.base.shape[1] // self.scale.shape[1]

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self)


def encode(rows: Tensor) -> Planes:
    """Rounds rows ``[n, d]``, in groups of 64 weights or what of it divides d, which must be a multiple of 4."""
    n, d = rows.shape
    step = max(1, ROWS_AT_ONCE // d)
    with without_autocast(rows.device):
        parts = [_encode(rows[start : start + step].float()) for start in range(0, n, step)]
        return Planes(*(torch.cat(tensors) for tensors in zip(*parts)))


def _encode(rows: Tensor) -> Planes:
    n, d = rows.shape
    group = group_of(d)
    parts = rows.view(n, d // group, group)
    scale = _scale(parts, BASE_BITS)
    value = parts / scale.float().unsqueeze(-1)
    code = codes_of(parts, scale, BASE_BITS)
    cell = ((value - code + 0.5) * 16).floor().clamp_(0, 15).to(torch.uint8)
    low, high = (code + 8).to(torch.uint8).chunk(2, dim=-1)
    base = (low | (high << 4)).reshape(n, d // 2)
    return Planes(base, _pairs(cell >> 2).reshape(n, d // 4), _pairs(cell & 3).reshape(n, d // 4), scale)


def rounded(rows: Tensor, bits: int, group: int) -> Tensor:
    """Rows ``[n, d]`` rounded to nearest in so many bits by themselves, as a plain quantiser does, float32."""
    parts = rows.float().view(len(rows), -1, group)
    scale = _scale(parts, bits)
    return (codes_of(parts, scale, bits) * scale.float().unsqueeze(-1)).flatten(1)


def _scale(parts: Tensor, bits: int) -> Tensor:
    """Scales of groups ``[..., group]``, float16, of either sign."""
    extreme, highest = extreme_of(parts), 2 ** (bits - 1)
    return best_scale(parts, bits, (as_half(extreme / (code * highest / 8)) for code in CODES_OF_EXTREME))


def _pairs(cells: Tensor) -> Tensor:
    """Values of two bits ``[n, groups, group]`` as bytes ``[n, groups, group / 4]``."""
    first, second, third, fourth = cells.chunk(4, dim=-1)
    return first | (second << 2) | (third << 4) | (fourth << 6)


def decode(planes: Planes, bits: int) -> Tensor:
    """Rows as they are read in so many bits, float32 ``[n, d]``."""
    groups = planes.scale.shape[1]
    base = planes.base.view(len(planes.base), groups, -1)
    u = torch.cat([base & 15, base >> 4], dim=-1)
    for needed, plane in ((6, planes.fine), (8, planes.finest)):
        if bits >= needed:
            pairs = plane.view(len(plane), groups, -1)
            u = (u << 2) | torch.cat([pairs >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    step = planes.scale.float() / 2 ** (bits - 4)
    return ((u.float() - MIDDLE[bits]) * step.unsqueeze(-1)).flatten(1)


def chosen(planes: Planes, index: Tensor) -> Planes:
    """Some of the rows, ``index`` ``[m]``."""
    return Planes(*(t[index] for t in planes))


def dot(planes: Planes, bits: int, index: Tensor, x: Tensor) -> Tensor:
    """``out[n, k] = rows[index[n, k]] . x[n]``, rows read in so many bits, float32: twin of C and Triton."""
    with without_autocast(x.device):
        rows = decode(chosen(planes, index.flatten()), bits).view(*index.shape, -1)
        return torch.einsum("nkd,nd->nk", rows, x.float())


def add(planes: Planes, bits: int, index: Tensor, h: Tensor) -> Tensor:
    """``out[n] = sum over k of h[n, k] * rows[index[n, k]]``, rows read in so many bits, float32 ``[n, d]``."""
    with without_autocast(h.device):
        rows = decode(chosen(planes, index.flatten()), bits).view(*index.shape, -1)
        return torch.einsum("nkd,nk->nd", rows, h.float())

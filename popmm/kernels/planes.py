"""Weights in nested planes: a base of 4 or 3 bits of every weight, 2 more, and 2 more, one scale per group of a row.

A weight w in a group of scale s is ``code = round(w / s)`` in [-8, 7] (of 3 bits [-4, 3]), and where it lies within
the code's cell: ``fine`` tells the quarter, ``finest`` the quarter of the quarter. With 4, 6 or 8 bits read (3, 5 or 7)
it is taken to lie in the middle of its cell, so that each precision is centred by itself. In one number,
``u = (code + 2^(base - 1)) * 2^(bits - base) + cell``, and the value is ``s * (u - middle(bits)) / 2^(bits - base)``.

Rows that are read in one precision alone need no such middles: they are rounded for it, as a plain quantiser does
(``encode_plain``), and their bits are named with ``PLAIN`` added.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from popmm.kernels.precision import without_autocast
from popmm.kernels.twin import ROWS_AT_ONCE, as_half, best_scale, codes_of, extreme_of, group_of

# scales that are tried: the group's weight of largest magnitude becomes this code (or is clipped to the last one)
CODES_OF_EXTREME = (-8.0, -7.6, -7.2, -6.8, -6.24, 7.0, 6.5, 6.0)
BASES = (4, 3)  # bits that the first plane may have
MIDDLE = {3: 4.0, 4: 8.0, 5: 17.5, 6: 33.5, 7: 71.5, 8: 135.5}
PLAIN = 16  # added to bits in which rows were rounded by ``encode_plain``


def plainly(bits: int) -> int:
    """How rows of ``encode_plain`` are read in their bits; a base is read as ever."""
    return bits | PLAIN if bits > max(BASES) else bits


def number_of(bits: int) -> int:
    """Bits that are read, without ``PLAIN``."""
    return bits & ~PLAIN


def middle(bits: int) -> float:
    """The number that stands for 0."""
    return 2.0 ** (number_of(bits) - 1) if bits & PLAIN else MIDDLE[bits]


def base_of(bits: int) -> int:
    """Bits of the first plane, in whose family rows are read in ``bits``."""
    return 3 if bits % 2 else 4


class Planes(NamedTuple):
    """Rows ``[n, d]``. Those in one plane of 4 bits are read in these, whatever is asked; the other two are empty."""

    # codes, counted from 0. 4 bits: uint8 [n, d / 2], the first half of a group in the low nibbles. 3 bits: uint8
    # [n, 3 d / 8], of each group the upper two bits in the order of `fine`, then the last one, weight i in byte i / 8
    base: Tensor
    fine: Tensor  # uint8 [n, d / 4]: the k-th quarter of a group in the k-th pair of bits
    finest: Tensor  # the same
    scale: Tensor  # float16 [n, d / group], of either sign

    @property
    def d(self) -> int:
        return 4 * self.fine.shape[1] or 2 * self.base.shape[1]

    @property
    def group(self) -> int:
        return self.d // self.scale.shape[1]

    @property
    def base_bits(self) -> int:
        return 8 * self.base.shape[1] // self.d

    @property
    def precisions(self) -> tuple[int, ...]:
        """Bits in which these rows can be read, the best first."""
        further = 2 * sum(plane.shape[1] > 0 for plane in (self.fine, self.finest))
        return tuple(range(self.base_bits + further, self.base_bits - 1, -2))

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self)


def encode(rows: Tensor, base_bits: int = 4) -> Planes:
    """Rounds rows ``[n, d]``, in groups of 64 weights or what of it divides d, which must be a multiple of 8."""
    n, d = rows.shape
    step = max(1, ROWS_AT_ONCE // d)
    with without_autocast(rows.device):
        parts = [_encode(rows[start : start + step].float(), base_bits) for start in range(0, n, step)]
        return Planes(*(torch.cat(tensors) for tensors in zip(*parts)))


def _encode(rows: Tensor, base_bits: int) -> Planes:
    n, d = rows.shape
    group = group_of(d)
    parts = rows.view(n, d // group, group)
    scale = _scale(parts, base_bits)
    code = codes_of(parts, scale, base_bits)
    value = parts / scale.float().unsqueeze(-1)
    cell = ((value - code + 0.5) * 16).floor().clamp_(0, 15).to(torch.uint8)
    u = (code + 2 ** (base_bits - 1)).to(torch.uint8)
    return Planes(_packed_base(u, base_bits), *(_packed(own, 4).flatten(1) for own in (cell >> 2, cell & 3)), scale)


def encode_plain(rows: Tensor, bits: int) -> Planes:
    """Rows as ``encode`` takes them, rounded for being read in ``plainly(bits)`` alone."""
    if plainly(bits) == bits:
        return encode(rows, base_of(bits))
    step = max(1, ROWS_AT_ONCE // rows.shape[1])
    with without_autocast(rows.device):
        parts = [_encode_plain(rows[i : i + step].float(), bits) for i in range(0, len(rows), step)]
        return Planes(*(torch.cat(tensors) for tensors in zip(*parts)))


def _encode_plain(rows: Tensor, bits: int) -> Planes:
    n, d = rows.shape
    base_bits = base_of(bits)
    parts, cells = rows.view(n, -1, group_of(d)), 2 ** (bits - base_bits)
    extreme, highest = extreme_of(parts), 2 ** (bits - 1)
    tried = (as_half(extreme / (code * highest / 8) * cells).float() / cells for code in CODES_OF_EXTREME)
    scale = best_scale(parts, bits, tried)
    u = (codes_of(parts, scale, bits) + highest).to(torch.uint8)
    planes = [_packed(u >> shift & 3, 4).flatten(1) for shift in range(bits - base_bits - 2, -1, -2)]
    none = [planes[0][:, :0]] * (2 - len(planes))
    return Planes(_packed_base(u // cells, base_bits), *planes, *none, (scale * cells).half())


def _packed_base(u: Tensor, base_bits: int) -> Tensor:
    if base_bits == 4:
        return packed_codes(u)
    return torch.cat([_packed(u >> 1, 4), _last_bits(u & 1)], dim=-1).flatten(1)


def packed_codes(u: Tensor) -> Tensor:
    """4-bit codes, counted from 0, of groups ``[n, groups, group]`` as the base of planes."""
    low, high = u.chunk(2, dim=-1)
    return (low | (high << 4)).flatten(1)


def rounded(rows: Tensor, bits: int, group: int) -> Tensor:
    """Rows ``[n, d]`` rounded to nearest in so many bits by themselves, as a plain quantiser does, float32."""
    parts = rows.float().view(len(rows), -1, group)
    scale = _scale(parts, bits)
    return (codes_of(parts, scale, bits) * scale.float().unsqueeze(-1)).flatten(1)


def _scale(parts: Tensor, bits: int) -> Tensor:
    """Scales of groups ``[..., group]``, float16, of either sign."""
    best = best_scale(parts, bits, _by_extreme(parts, bits))
    if bits > 3:
        return best
    code = codes_of(parts, best, bits)  # few levels: what least squares gives for these codes is better yet
    fitted = as_half((code * parts).sum(-1) / code.square().sum(-1).clamp_min(1))
    return best_scale(parts, bits, (best, fitted))


def _by_extreme(parts: Tensor, bits: int) -> Iterator[Tensor]:
    extreme, highest = extreme_of(parts), 2 ** (bits - 1)
    return (as_half(extreme / (code * highest / 8)) for code in CODES_OF_EXTREME)


def _packed(values: Tensor, per_byte: int) -> Tensor:
    """Values of ``8 / per_byte`` bits ``[..., m]`` as bytes ``[..., m / per_byte]``: the k-th part in the k-th bits."""
    first, *others = values.chunk(per_byte, dim=-1)
    for k, part in enumerate(others, start=1):
        first = first | (part << (8 // per_byte * k))
    return first


def _unpacked(packed: Tensor, per_byte: int) -> Tensor:
    width = 8 // per_byte
    return torch.cat([packed >> (width * k) & (2**width - 1) for k in range(per_byte)], dim=-1)


def _last_bits(bits: Tensor) -> Tensor:
    """Bits ``[..., m]`` as bytes ``[..., m / 8]``, bit i in byte i / 8."""
    return _packed(bits.unflatten(-1, (-1, 8)), 8).squeeze(-1)


def decode(planes: Planes, bits: int) -> Tensor:
    """Rows as they are read in so many bits, float32 ``[n, d]``."""
    groups, group, base_bits = planes.scale.shape[1], planes.group, planes.base_bits
    bits = reading(planes, bits)
    base = planes.base.unflatten(1, (groups, -1))
    if base_bits == 4:
        u = _unpacked(base, 2)
    else:
        upper, last = base.split([group // 4, group // 8], dim=-1)
        u = (_unpacked(upper, 4) << 1) | _unpacked(last.unsqueeze(-1), 8).flatten(-2)
    for needed, plane in ((base_bits + 2, planes.fine), (base_bits + 4, planes.finest)):
        if number_of(bits) >= needed:
            u = (u << 2) | _unpacked(plane.unflatten(1, (groups, -1)), 4)
    step = planes.scale.float() / 2 ** (number_of(bits) - base_bits)
    return ((u.float() - middle(bits)) * step.unsqueeze(-1)).flatten(1)


def reading(planes: Planes, bits: int) -> int:
    """The bits in which rows are read where so many are asked for: those of one plane in these."""
    return bits if number_of(bits) <= planes.precisions[0] else planes.precisions[0]


def chosen(planes: Planes, index: Tensor) -> Planes:
    """Some of the rows, ``index`` ``[m]``."""
    return Planes(*(t[index] for t in planes))


def dot(planes: Planes, bits: int, index: Tensor, x: Tensor) -> Tensor:
    """``out[n, k] = rows[index[n, k]] . x[n]``, rows read in so many bits, float32: twin of C and Triton."""
    with without_autocast(x.device):
        rows = decode(chosen(planes, index.flatten()), bits).view(*index.shape, planes.d)
        return torch.einsum("nkd,nd->nk", rows, x.float())


def add(planes: Planes, bits: int, index: Tensor, h: Tensor) -> Tensor:
    """``out[n] = sum over k of h[n, k] * rows[index[n, k]]``, rows read in so many bits, float32 ``[n, d]``."""
    with without_autocast(h.device):
        rows = decode(chosen(planes, index.flatten()), bits).view(*index.shape, planes.d)
        return torch.einsum("nkd,nk->nd", rows, h.float())

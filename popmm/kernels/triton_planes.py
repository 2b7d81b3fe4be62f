"""Triton kernels: products with chosen rows in nested planes. Deterministic, float32 accumulation, no atomics.

A group is read by quarters: the k-th quarter's nibbles lie in the low halves of the bytes for k < 2, in the high ones
else, and its further bits in the k-th pair of each byte of ``fine`` and ``finest``. Planes of 3 bits have the upper two
of them in such pairs, followed by a byte for the last bits of eight weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from popmm.kernels.planes import Planes, middle, number_of, reading
from popmm.kernels.triton_rows import SPLITS, _device


@triton.jit
def _quarter(base, fine, finest, at, inside, Q: tl.constexpr, BITS: tl.constexpr, QUARTER: tl.constexpr):
    """Numbers of one quarter of a group, float32 ``[rows, QUARTER]``; ``at``: the place of its pairs' bytes."""
    column = at % QUARTER
    if BITS % 2 == 1:
        start, i = (at - column) // 2 * 3, Q * QUARTER + column
        u = ((tl.load(base + start + column, mask=inside, other=0) >> (2 * Q)) & 3) << 1
        u = u | ((tl.load(base + start + QUARTER + i // 8, mask=inside, other=0) >> (i % 8)) & 1)
    else:
        nibbles = at * 2 - column + (Q % 2) * QUARTER  # a group's nibbles take two quarters' bytes
        u = (tl.load(base + nibbles, mask=inside, other=0) >> (4 * (Q // 2))) & 15
    if BITS >= 5:
        u = (u << 2) | ((tl.load(fine + at, mask=inside, other=0) >> (2 * Q)) & 3)
    if BITS >= 7:
        u = (u << 2) | ((tl.load(finest + at, mask=inside, other=0) >> (2 * Q)) & 3)
    return u.to(tl.float32)


@triton.jit
def _dot(
    base,
    fine,
    finest,
    scale,
    index,
    x,
    out,
    k,
    MIDDLE: tl.constexpr,
    CELLS: tl.constexpr,
    d: tl.constexpr,
    BITS: tl.constexpr,
    QUARTER: tl.constexpr,
    ALL: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0)
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = place < k
    row = place.to(tl.int64) if ALL else tl.load(index + token * k + place, mask=valid, other=0)
    column = tl.arange(0, QUARTER)
    groups: tl.constexpr = d // (4 * QUARTER)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for g in range(0, groups):
        s = tl.load(scale + row * groups + g, mask=valid, other=0).to(tl.float32)
        at = (row * (d // 4) + g * QUARTER)[:, None] + column[None, :]
        part = tl.zeros([ROWS], dtype=tl.float32)
        for q in tl.static_range(4):
            v = tl.load(x + token * d + (g * 4 + q) * QUARTER + column).to(tl.float32)
            u = _quarter(base, fine, finest, at, valid[:, None], q, BITS, QUARTER)
            part += tl.sum((u - MIDDLE) * v[None, :], axis=1)
        total += s * part
    tl.store(out + token * k + place, total / CELLS, mask=valid)


@triton.jit
def _add(
    base,
    fine,
    finest,
    scale,
    index,
    h,
    parts,
    k,
    n,
    MIDDLE: tl.constexpr,
    CELLS: tl.constexpr,
    d: tl.constexpr,
    BITS: tl.constexpr,
    QUARTER: tl.constexpr,
    PER_SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    token, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = tl.arange(0, QUARTER)
    groups: tl.constexpr = d // (4 * QUARTER)
    end = tl.minimum((split + 1) * PER_SPLIT, k)
    for q in tl.static_range(4):
        total = tl.zeros([QUARTER], dtype=tl.float32)
        for start in range(0, PER_SPLIT, ROWS):
            place = split * PER_SPLIT + start + tl.arange(0, ROWS)
            valid = place < end
            row = tl.load(index + token * k + place, mask=valid, other=0)
            weight = tl.load(h + token * k + place, mask=valid, other=0).to(tl.float32)
            weight *= tl.load(scale + row * groups + g, mask=valid, other=0).to(tl.float32)
            at = (row * (d // 4) + g * QUARTER)[:, None] + column[None, :]
            u = _quarter(base, fine, finest, at, valid[:, None], q, BITS, QUARTER)
            total += tl.sum((u - MIDDLE) * weight[:, None], axis=0)
        to = parts + (split * n + token) * d + (g * 4 + q) * QUARTER + column
        tl.store(to, total / CELLS)


def _coding(rows: Planes, bits: int) -> dict:
    bits = reading(rows, bits)
    cells = 2 ** (number_of(bits) - rows.base_bits)
    return dict(MIDDLE=middle(bits), CELLS=cells, BITS=number_of(bits), QUARTER=rows.group // 4)


def planes_dot(rows: Planes, bits: int, index: Tensor | None, x: Tensor) -> Tensor:
    """``index`` None: all rows."""
    x, every = x.contiguous(), index is None
    n, k = (len(x), len(rows.base)) if every else index.shape
    out = torch.empty(n, k, dtype=torch.float32, device=x.device)
    own = x if every else index.contiguous()
    how = dict(d=x.shape[1], ALL=every, ROWS=16, **_coding(rows, bits))
    with _device(x):
        _dot[(n, triton.cdiv(k, 16))](*rows, own, x, out, k, **how)
    return out


class PlanesLinear:
    """All rows, for each x by itself."""

    def __init__(self, rows: Planes, bits: int) -> None:
        self._how = rows, bits, None

    def __call__(self, x: Tensor) -> Tensor:
        return planes_dot(*self._how, x)


def planes_add(rows: Planes, bits: int, index: Tensor, h: Tensor) -> Tensor:
    index, h = index.contiguous(), h.contiguous()
    (n, k), d = index.shape, rows.d
    parts = torch.empty(SPLITS, n, d, dtype=torch.float32, device=h.device)
    how = dict(d=d, PER_SPLIT=triton.cdiv(k, SPLITS), ROWS=16, **_coding(rows, bits))
    with _device(h):
        _add[(n, d // rows.group, SPLITS)](*rows, index, h, parts, k, n, **how)
    return parts.sum(0)

"""Triton kernels: products with chosen rows of a matrix. Deterministic, float32 accumulation, no atomics."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLITS = 16  # partial sums of gather_sum


@triton.jit
def _gather_dot(rows, index, x, out, stride, k, d: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0)
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    chosen = tl.load(index + token * k + place, mask=place < k, other=0)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < d
        w = tl.load(
            rows + chosen[:, None] * stride + column[None, :], mask=(place < k)[:, None] & inside[None, :], other=0
        )
        v = tl.load(x + token * d + column, mask=inside, other=0)
        total += tl.sum(w.to(tl.float32) * v.to(tl.float32)[None, :], axis=1)
    tl.store(out + token * k + place, total, mask=place < k)


@triton.jit
def _gather_sum(
    rows, index, h, parts, stride, k, d, n, PER_SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    token, split = tl.program_id(0), tl.program_id(2)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    end = tl.minimum((split + 1) * PER_SPLIT, k)
    for start in range(0, PER_SPLIT, ROWS):
        place = split * PER_SPLIT + start + tl.arange(0, ROWS)
        valid = place < end
        chosen = tl.load(index + token * k + place, mask=valid, other=0)
        weight = tl.load(h + token * k + place, mask=valid, other=0)
        w = tl.load(
            rows + chosen[:, None] * stride + column[None, :], mask=valid[:, None] & (column < d)[None, :], other=0
        )
        total += tl.sum(w.to(tl.float32) * weight.to(tl.float32)[:, None], axis=0)
    tl.store(parts + (split * n + token) * d + column, total, mask=column < d)


@triton.jit
def _block_dot(matrices, block, x, out, apart, stride, r, d: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = row < r
    first = matrices + tl.load(block + token) * apart + row.to(tl.int64)[:, None] * stride
    total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < d
        w = tl.load(first + column[None, :], mask=valid[:, None] & inside[None, :], other=0)
        v = tl.load(x + token * d + column, mask=inside, other=0)
        total += tl.sum(w.to(tl.float32) * v.to(tl.float32)[None, :], axis=1)
    tl.store(out + token * r + row, total, mask=valid)


@triton.jit
def _quantised_dot(
    codes,
    scale,
    x,
    block,
    out,
    r,
    d: tl.constexpr,
    groups: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = row < r
    first = tl.load(block + token) * r
    codes += first * (d * BITS // 8)
    scale += first * groups
    total = tl.zeros([ROWS], dtype=tl.float32)
    for g in range(0, groups):
        s = tl.load(scale + row * groups + g, mask=valid, other=0).to(tl.float32)
        if BITS == 8:
            column = tl.arange(0, GROUP)
            c = tl.load(codes + row[:, None] * d + g * GROUP + column[None, :], mask=valid[:, None], other=0)
            v = tl.load(x + token * d + g * GROUP + column).to(tl.float32)
            total += s * tl.sum(c.to(tl.float32) * v[None, :], axis=1)
        else:
            half: tl.constexpr = GROUP // 2
            column = tl.arange(0, half)
            c = tl.load(codes + row[:, None] * (d // 2) + g * half + column[None, :], mask=valid[:, None], other=0)
            low = tl.load(x + token * d + g * GROUP + column).to(tl.float32)
            high = tl.load(x + token * d + g * GROUP + half + column).to(tl.float32)
            products = ((c & 15).to(tl.float32) - 8) * low[None, :] + ((c >> 4).to(tl.float32) - 8) * high[None, :]
            total += s * tl.sum(products, axis=1)
    tl.store(out + token * r + row, total, mask=valid)


def _device(t: Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def gather_dot(rows: Tensor, index: Tensor, x: Tensor) -> Tensor:
    index, x = index.contiguous(), x.contiguous()
    n, k = index.shape
    out = torch.empty(n, k, dtype=torch.float32, device=x.device)
    grid = (n, triton.cdiv(k, 8))
    with _device(x):
        _gather_dot[grid](rows, index, x, out, rows.stride(0), k, rows.shape[1], ROWS=8, COLUMNS=512)
    return out


def gather_sum(rows: Tensor, index: Tensor, h: Tensor) -> Tensor:
    index, h = index.contiguous(), h.contiguous()
    n, k = index.shape
    d = rows.shape[1]
    parts = torch.empty(SPLITS, n, d, dtype=torch.float32, device=h.device)
    per_split = triton.cdiv(k, SPLITS)
    grid = (n, triton.cdiv(d, 256), SPLITS)
    with _device(h):
        _gather_sum[grid](rows, index, h, parts, rows.stride(0), k, d, n, per_split, ROWS=16, COLUMNS=256)
    return parts.sum(0)


def block_dot(matrices: Tensor, x: Tensor, block: Tensor) -> Tensor:
    x, block = x.contiguous(), block.contiguous()
    n, (_, r, d) = len(x), matrices.shape
    out = torch.empty(n, r, dtype=torch.float32, device=x.device)
    with _device(x):
        _block_dot[(n, triton.cdiv(r, 8))](matrices, block, x, out, *matrices.stride()[:2], r, d, ROWS=8, COLUMNS=512)
    return out


def quantised_dot(codes: Tensor, scale: Tensor, x: Tensor, bits: int, group: int, block: Tensor, n_rows: int) -> Tensor:
    x, block = x.contiguous(), block.contiguous()
    n, d = x.shape
    r = n_rows
    out = torch.empty(n, r, dtype=torch.float32, device=x.device)
    with _device(x):
        _quantised_dot[(n, triton.cdiv(r, 16))](
            codes, scale, x, block, out, r, d, d // group, BITS=bits, GROUP=group, ROWS=16
        )
    return out

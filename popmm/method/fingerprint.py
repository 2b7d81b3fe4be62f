"""A cheap fingerprint of weights: each channel's projection on a fixed random vector.

Norms cannot tell a row from another of its length, and versions do not see what is written through ``.data``. A
projection costs one reading of the weights, and changes with any of their values.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from popmm import kernels
from popmm.kernels.precision import without_autocast
from popmm.method.ffn import FFNWeights

SAME = 1e-5  # of the largest projection: the rounding of another order of summation
ALIKE = 0.5  # correlation from which two lists of marks are of the same channels
IDENTIFYING = 64  # projections that tell one FFN from another


def fingerprint(weights: FFNWeights) -> list[Tensor]:
    """Marks of gate rows, up rows, down columns and the biases there are, float32 ``[(E,) d_ff]`` each, as they lie."""
    with torch.inference_mode(False), torch.no_grad(), without_autocast(weights.gate.device):
        vector, rows = _direction(weights.d_model, weights.gate.device), weights.by_channel()
        n = len(weights.matrices)
        return [_of_rows(w, vector) for w in rows[:n]] + [b.to(torch.float32, copy=True) for b in rows[n:]]


def marks_of(weight: Tensor) -> Tensor:
    """Marks of the rows of one matrix, float32 ``[n]``."""
    with torch.inference_mode(False), torch.no_grad(), without_autocast(weight.device):
        return _of_rows(weight, _direction(weight.shape[-1], weight.device))


def same(before: list[Tensor], now: list[Tensor]) -> bool:
    """Whether two fingerprints are of the same contents in the same places."""
    return len(before) == len(now) and all(map(_same, before, now))


def _same(before: Tensor, now: Tensor) -> bool:
    if before.shape != now.shape or before.device != now.device:
        return False
    if torch.equal(before, now):
        return True
    size = before.abs().max()
    return bool(((before - now).abs() <= SAME * size).all())


def order_of(before: list[Tensor], now: list[Tensor], order: Tensor) -> Literal["ours", "own", "unknown"]:
    """In which order weights lie that somebody has written: as we left them, or the model's own.

    What was moved to another device or dtype, scaled, negated, or changed a little, still resembles what we left,
    channel by channel. What was loaded resembles the same channels in the model's own order, or nothing that we know.

    Args:
        before: marks as we left them, each ``[(E,) d_ff]``.
        now: the marks found.
        order: the channel at each position, int64 ``[(E,) d_ff]``.
    """
    order = order.to("cpu")
    moved = order != torch.arange(order.shape[-1], device="cpu", dtype=torch.int64)
    if not moved.any():
        return "ours"
    ours = theirs = 0.0
    for mark, found in zip(before, now):
        mark, found = mark.to("cpu", torch.float64), found.to("cpu", torch.float64)
        own = torch.empty_like(mark).scatter_(-1, order, mark)
        ours = max(ours, _likeness(mark[moved], found[moved]))
        theirs = max(theirs, _likeness(own[moved], found[moved]))
    if max(ours, theirs) < ALIKE:
        return "unknown"
    return "ours" if ours >= theirs else "own"


def _likeness(a: Tensor, b: Tensor) -> float:
    """Size of the correlation; 1 for the same values, 0 where there is nothing to correlate."""
    if torch.equal(a, b):
        return 1.0
    a, b = a - a.mean(), b - b.mean()
    size = a.norm() * b.norm()
    return float(((a * b).sum() / size).abs()) if size > 0 else 0.0


def _of_rows(w: Tensor, vector: Tensor) -> Tensor:
    """Projections of rows ``[(E,) n, d]`` on ``vector`` ``[d]``, float32 ``[(E,) n]``."""
    w = w.detach()
    stack = w if w.ndim == 3 else w.unsqueeze(0)
    index = torch.arange(len(stack), device=w.device, dtype=torch.int64)
    if kernels.reads_blocks(stack):
        marks = kernels.block_dot(stack, vector.expand(len(stack), -1), index)
    elif kernels.reads_blocks(stack.mT) and (stack.mT.stride(0) % stack.mT.stride(1) == 0 or len(stack) == 1):
        marks = torch.cat([_of_columns(matrix.mT, vector) for matrix in stack])
    else:
        marks = torch.stack([_plain(matrix, vector) for matrix in stack])
    return marks if w.ndim == 3 else marks[0]


def _of_columns(w: Tensor, vector: Tensor) -> Tensor:
    """Projections of the columns of ``w`` ``[d, n]`` whose rows lie in one piece each, ``[1, n]``."""
    rows = torch.arange(len(w), device=w.device, dtype=torch.int64).unsqueeze(0)
    return kernels.gather_sum(w, rows, vector.unsqueeze(0))


def _plain(w: Tensor, vector: Tensor, at_once: int = 1 << 22) -> Tensor:
    step = max(1, at_once // w.shape[-1])
    return torch.cat([w[i : i + step].to(torch.float32) @ vector for i in range(0, len(w), step)])


@functools.lru_cache(maxsize=16)
def _direction(d_model: int, device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(d_model, generator=generator, dtype=torch.float32, device="cpu").to(device)

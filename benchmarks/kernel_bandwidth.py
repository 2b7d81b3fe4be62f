"""Bandwidth of the kernels against torch's own products of the same bytes.

python benchmarks/kernel_bandwidth.py [--tiny]  # on CUDA in bfloat16 if there is one, else on the CPU in both dtypes
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from popmm import kernels
from popmm.kernels import planes
from popmm.kernels.twin import quantise
from popmm.method.expert_linear import _grouped
from popmm.method.tiers import row_bits

TINY = "--tiny" in sys.argv
D_MODEL, D_FF, EXPERTS, ROUTED = (64, 256, 8, 2) if TINY else (4096, 14336, 32, 4)
MATRICES = 4  # in turn, so that no cache holds them


def seconds(run: Callable[[int], object], device: str) -> float:
    """Median over repeated calls, each with the next of the matrices."""
    times = []
    for i in range(3 if TINY else 30):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run(i % MATRICES)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[len(times) // 4 :])


def linear(nested: list, bits: int, x: torch.Tensor, i: int) -> torch.Tensor:
    return kernels.PlanesLinear(nested[i], bits)(x)


def dot(nested: list, bits: int, index: torch.Tensor, x: torch.Tensor, i: int) -> torch.Tensor:
    return kernels.planes_dot(nested[i], bits, index, x)


def add(nested: list, bits: int, index: torch.Tensor, h: torch.Tensor, i: int) -> torch.Tensor:
    return kernels.planes_add(nested[i], bits, index, h)


def measure(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(D_FF, D_MODEL, device=device).to(dtype) for _ in range(MATRICES)]
    stacks = [w.view(EXPERTS, D_FF // EXPERTS, D_MODEL) for w in weights]
    codes = {bits: [quantise(w, bits, 64) for w in weights] for bits in (8, 4)}
    x = torch.randn(1, D_MODEL, device=device).to(dtype)
    half = D_FF // 2
    index = torch.randperm(D_FF)[:half].sort()[0][None].to(device)
    h, none = torch.randn(1, half, device=device).to(dtype), torch.zeros(1, dtype=torch.int64, device=device)
    routed, pairs = torch.arange(ROUTED, device=device) * 2, x.repeat(ROUTED, 1)
    size = weights[0].element_size()
    every, some = D_FF * D_MODEL * size, ROUTED * D_FF // EXPERTS * D_MODEL * size
    rows: dict[str, tuple[Callable, float]] = {
        "reading (a sum)": (lambda i: weights[i].view(torch.int32).sum(dtype=torch.int32), every),
        "dense product": (lambda i: F.linear(x, weights[i]), every),
        "gather_dot, half of the rows": (lambda i: kernels.gather_dot(weights[i], index, x), every / 2),
        "gather_sum, half of the rows": (lambda i: kernels.gather_sum(weights[i], index, h), every / 2),
        "quantised_dot, 8 bit": (
            lambda i: kernels.quantised_dot(*codes[8][i], x, 8, 64, none, D_FF),
            every / size * (1 + 2 / 64),
        ),
        "quantised_dot, 4 bit": (
            lambda i: kernels.quantised_dot(*codes[4][i], x, 4, 64, none, D_FF),
            every / size * (0.5 + 2 / 64),
        ),
        f"block_dot, {ROUTED} of {EXPERTS} experts": (lambda i: kernels.block_dot(stacks[i], pairs, routed), some),
    }
    families = {base: [planes.encode(w, base) for w in weights] for base in planes.BASES}
    wide = x.float()
    for bits in (8, 6, 4, 7, 5, 3):
        nested = families[planes.base_of(bits)]
        n_bytes = every / size * row_bits(bits, 64) / 8
        rows[f"planes, {bits} bits, all rows"] = (functools.partial(linear, nested, bits, wide), n_bytes)
        rows[f"planes, {bits} bits, dot, half"] = (functools.partial(dot, nested, bits, index, wide), n_bytes / 2)
        rows[f"planes, {bits} bits, sum, half"] = (functools.partial(add, nested, bits, index, h.float()), n_bytes / 2)
    if device == "cuda":
        rows["grouped product, the same experts"] = (lambda i: _grouped(pairs, stacks[i], routed), some)
    print(f"\n{device}, {str(dtype).removeprefix('torch.')}, {D_FF} x {D_MODEL}")
    most = 0.0  # what reading alone reaches, in the first row
    for name, (run, n_bytes) in rows.items():
        taken = seconds(run, device)
        rate = n_bytes / taken / 1e9
        most = most or rate
        print(f"  {name:36} {taken * 1e6:9.0f} us {rate:8.1f} GB/s {rate / most:7.0%} of reading")


if __name__ == "__main__":
    if torch.cuda.is_available():
        measure("cuda", torch.bfloat16)
    else:
        for dtype in (torch.float32, torch.bfloat16):
            measure("cpu", dtype)

"""The C kernels as native operators: cheaper calls than through ctypes, and compiled code makes them without Python."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from popmm.kernels.build import operators as _library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that they take
_sizes: dict[int, int] = {}  # rows of each linear layer, by handle
_available: bool | None = None  # not known yet. ``attach`` asks first: compiled code that asks must find the answer
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def available() -> bool:
    """Whether the operators could be built; tells the compiler what shapes come out."""
    global _available
    if _available is None:
        _available = _library() is not None
        if _available:
            _tell_shapes()
    return _available


def _tell_shapes() -> None:
    fakes = {
        "planes_linear": lambda x, handles: x.new_empty(*x.shape[:-1], sum(_sizes[int(handle)] for handle in handles)),
        "few_linear": lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
        "attend": lambda q, k, v, mask, scale: q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]),
        "tiers_ffn": lambda x, first, votes, wide, handle: x.new_empty(
            x.shape, dtype=torch.float32 if wide else x.dtype
        ),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"popmm_native::{name}", fake)


def linear(owner: object, arguments: Sequence, n_rows: int) -> int:
    """A handle of a linear layer, for as long as its owner lives."""
    library = _library()
    handle = library.new_linear(*arguments)
    _sizes[handle] = n_rows
    weakref.finalize(owner, library.free_linear, handle)
    return handle


def ffn(owner: object, arguments: Sequence) -> int:
    """A handle of an FFN in tiers, for as long as its owner lives."""
    library = _library()
    handle = library.new_ffn(*arguments)
    weakref.finalize(owner, library.free_ffn, handle)
    return handle


def planes_linear(x: Tensor, handles: list[int]) -> Tensor:
    """x ``[..., d]`` through several layers, ``[..., rows of all]``."""
    return torch.ops.popmm_native.planes_linear(x, handles)


def few_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of a few vectors x ``[..., d]``, all in bfloat16: weights ``[m, d]`` are read once for all."""
    return torch.ops.popmm_native.few_linear(x.contiguous(), weight, bias)


def serves_few(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether ``few_linear`` takes these weights: plain ones, for a quantised layer's compute something else."""
    fits = type(weight) in _PLAIN and weight.is_cpu and weight.dtype == torch.bfloat16
    fits = fits and weight.layout is torch.strided and weight.ndim == 2
    fits = fits and weight.stride(1) == 1 and 0 < weight.shape[1] <= weight.stride(0)
    if fits and bias is not None:
        fits = type(bias) in _PLAIN and bias.dtype == weight.dtype and bias.shape == weight.shape[:1]
        fits = fits and bias.is_contiguous()
    return fits and available()


def tiers_ffn(x: Tensor, first: Tensor | None, votes: Tensor | None, wide: bool, handle: int) -> Tensor:
    return torch.ops.popmm_native.tiers_ffn(x, first, votes, wide, handle)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of n queries per head, ``[batch, heads, n, d]``, over keys and values ``[batch, shared, tokens, d]``.

    Args:
        mask: ``[1 or batch, 1 or heads, n, tokens]``, bool (False leaves a token out, which is not read) or floating
            point, which is added; None = all tokens.

    Returns:
        ``[batch, n, heads, d]`` in the dtype of q.
    """
    return torch.ops.popmm_native.attend(q.contiguous(), k, v, mask, scale)

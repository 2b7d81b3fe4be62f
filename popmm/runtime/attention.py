"""Attention of decode steps on the CPU by our kernel: torch's takes most of a step over a long static cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from popmm import kernels
from popmm.compat import ATTENTION, attention_of, register_attention
from popmm.kernels import operators
from popmm.runtime.overrides import Override
from popmm.runtime.rest import SMALL_BATCH

NAME, INSTEAD_OF = "popmm", "sdpa"
_DTYPES = (torch.float32, torch.bfloat16)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: one token per sequence by our kernel, all else as before."""
    if _serves(query, key, value, attention_mask) and kwargs.get("position_bias") is None and not dropout:
        scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        return operators.attend(query, key, value, attention_mask, scale), None
    before = (attention_mask, dropout, scaling, is_causal)
    return _before(module, query, key, value, *before, **kwargs)


def _serves(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    alike = query.is_cpu and query.dtype in _DTYPES and key.dtype == value.dtype == query.dtype
    alike = alike and query.shape[2] == 1 and query.shape[0] <= SMALL_BATCH and key.stride(-1) == value.stride(-1) == 1
    plain = mask is None or (mask.ndim == 4 and mask.shape[2] == 1 and mask.shape[3] == key.shape[2])
    return alike and plain and not kernels.needs_gradient(query, key, value)


_before = register_attention(NAME, _forward, INSTEAD_OF)


def attention_overrides(decoder: nn.Module) -> list[Override]:
    """What makes a decoder's steps attend by our kernel; nothing where it cannot be built or another way is set."""
    config = getattr(decoder, "config", None)
    if attention_of(config) != INSTEAD_OF or not operators.available():
        return []
    return [Override(config, ATTENTION, NAME)]

"""Attention of decode steps on the CPU by our kernel: torch's takes most of a step over a long static cache."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from popmm import kernels
from popmm.adapters.forms import is_mixer
from popmm.compat import ATTENTION, attention_of, register_attention
from popmm.kernels import FEW_TOKENS, operators
from popmm.runtime.overrides import Override
from popmm.runtime.phase import Phase
from popmm.runtime.rest import SMALL_BATCH

NAME, INSTEAD_OF = "popmm", "sdpa"
PHASE = "_popmm_phase"  # on modules that attend
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
    """transformers' attention interface: tokens of decode steps by our kernel, all else as before.

    With ``lossless`` in bfloat16 the tokens of a check too. Models that are not attached, but share the configuration
    of one that is, attend as before.
    """
    phase, most = module.__dict__.get(PHASE), 0
    if phase is not None and not phase.released:
        checks = phase.checking and phase.lossless and query.dtype == torch.bfloat16
        most = 1 if phase.step else FEW_TOKENS if checks else 0
    plain = all(kwargs.get(name) is None for name in ("position_bias", "softcap", "s_aux")) and not dropout
    if most and plain and _serves(query, key, value, attention_mask, most):
        scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        return operators.attend(query, key, value, attention_mask, scale), None
    before = (attention_mask, dropout, scaling, is_causal)
    return _before(module, query, key, value, *before, **kwargs)


def _serves(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, most: int) -> bool:
    """Whether the kernel takes these, and no more than ``most`` tokens, of which several have a mask."""
    heads, shared, n = query.shape[1], key.shape[1], query.shape[2]
    alike = query.is_cpu and query.shape[0] == key.shape[0] == value.shape[0] and heads % shared == 0
    alike = alike and query.dtype in _DTYPES and key.dtype == value.dtype == query.dtype
    alike = alike and n <= most and query.shape[0] <= SMALL_BATCH and key.stride(-1) == value.stride(-1) == 1
    plain = (mask is None and n == 1) or (
        mask is not None
        and mask.ndim == 4
        and mask.shape[0] in (1, query.shape[0])
        and mask.shape[1] in (1, heads)
        and mask.shape[2:] == (n, key.shape[2])
        and (mask.dtype == torch.bool or mask.is_contiguous())
    )
    return alike and plain and not kernels.needs_gradient(query, key, value)


_before = register_attention(NAME, _forward, INSTEAD_OF)


_ASKS = re.compile(r"_attn_implementation\s*(?:[=!]=|\b(?:not\s+)?in\b)")


def _asks_for_names(decoder: nn.Module) -> bool:
    """Whether a model's own code does something else by the name of its attention (sparse attention, Gemma 4)."""
    modules = {type(module).__module__ for module in decoder.modules()}
    sources = (Path(getattr(sys.modules.get(name), "__file__", None) or "") for name in modules)
    return any(file.suffix == ".py" and _ASKS.search(file.read_text(encoding="utf-8")) for file in sources)


def attention_overrides(decoder: nn.Module, phase: Phase) -> list[Override]:
    """What makes a decoder's steps attend by our kernel; nothing where it cannot be built or another way is set."""
    config = getattr(decoder, "config", None)
    if attention_of(config) != INSTEAD_OF or not operators.available() or _asks_for_names(decoder):
        return []
    mixers = [Override(part, PHASE, phase) for part in decoder.modules() if is_mixer(part)]
    return [Override(config, ATTENTION, NAME), *mixers]

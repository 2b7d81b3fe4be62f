"""Arithmetic in the dtypes that it is given, whatever the process is set to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_AS_IT_IS = nullcontext()


def _autocasts(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)  # there is none for meta tensors


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside, ``torch.autocast`` leaves products on ``device`` as they are."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device.type) else _AS_IT_IS


def output_dtype(weight: Tensor) -> torch.dtype:
    """dtype in which a linear layer of this weight answers: autocast's where it is on, else the weight's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if _autocasts(kind) and weight.dtype != torch.float64 else weight.dtype

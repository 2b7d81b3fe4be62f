"""Which rows of a pass are decode tokens, as vLLM's forward context tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger

logger = init_logger(__name__)
_KEY = "popmm"  # in the context's additional arguments, where each pass keeps its rows


class Rows(NamedTuple):
    """Of one pass, int64."""

    decoding: Tensor
    others: Tensor  # prompt tokens


def rows_of_pass() -> Rows | None:
    """Decode tokens and prompt tokens of the pass in progress; None where no sequence decodes.

    A decode token is the only one of its sequence in the pass, and not the sequence's first.
    """
    if not is_forward_context_available():
        return None
    context = get_forward_context()
    kept = context.additional_kwargs
    if _KEY not in kept:
        kept[_KEY] = _read(context.attn_metadata)
    return kept[_KEY]


def _read(metadata: object) -> Rows | None:
    if not metadata:  # a pass that profiles
        return None
    layers = metadata.values() if isinstance(metadata, dict) else ()
    own = next((layer for layer in layers if getattr(layer, "query_start_loc", None) is not None), None)
    if own is None:
        logger.warning_once(
            "popmm: this model's attention does not say which tokens belong to which sequence, so every pass is dense"
        )
        return None
    starts = own.query_start_loc.long()
    lengths, seq_lens = starts.diff(), getattr(own, "seq_lens", None)
    alone = lengths == 1
    if seq_lens is not None:
        alone = alone & (seq_lens[: len(alone)].to(alone.device) > 1)
    if not bool(alone.any()):
        return None
    decoding = starts[:-1][alone]
    rest = torch.ones(int(own.num_actual_tokens), dtype=torch.bool, device=starts.device)
    rest[decoding] = False
    return Rows(decoding, rest.nonzero().squeeze(1))


def by_rows(
    x: Tensor, rows: Rows, pruned: Callable[..., Tensor], dense: Callable[..., Tensor], *more: Tensor
) -> Tensor:
    """A pass whose rows x ``[n, ...]`` (and ``more``, row by row) are computed as what they are; y ``[n, d]``."""
    if len(rows.decoding) == len(x):
        return pruned(x, *more)
    others = rows.others
    padding = len(x) - len(rows.decoding) - len(others)
    some = pruned(x[rows.decoding], *(t[rows.decoding] for t in more))
    y = some.new_zeros(len(x), some.shape[1]) if padding else some.new_empty(len(x), some.shape[1])
    y[rows.decoding] = some
    if len(others):
        y[others] = dense(x[others], *(t[others] for t in more))
    return y


def check(vllm_config: VllmConfig) -> None:
    """Refuses what would run the layers past their methods."""
    if vllm_config.lora_config is not None:
        raise ValueError("quantization popmm reads the channels of the weights as loaded: leave LoRA out")
    if vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
        raise ValueError(
            "quantization popmm tells prompt from decode tokens in every pass, and a CUDA graph repeats what was "
            """recorded: give --enforce-eager, or --compilation-config '{"cudagraph_mode": "NONE"}'"""
        )

"""Which tokens of a pass are padding, from whatever form of mask transformers hands a decoder."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


def counted_tokens(attention_mask, shape: tuple[int, int], past: int) -> Tensor | None:
    """Which tokens of this pass are no padding, bool ``[batch, n_tokens]``; None if all count.

    Understands what transformers hands a decoder: None, the tokenizer's 2-D mask (covering the cache or
    only the new tokens), a prepared 4-D mask (boolean or additive), a BlockMask, or a dict of these by
    attention type.
    """
    if isinstance(attention_mask, dict):
        masks = [attention_mask.get("full_attention"), *attention_mask.values()]
        attention_mask = next((mask for mask in masks if mask is not None), None)
    if attention_mask is None:
        return None
    batch, n_tokens = shape
    if isinstance(attention_mask, BlockMask):
        counted = _block_diagonal(attention_mask, batch, n_tokens, past)
    elif attention_mask.ndim == 2:
        counted = _last_columns(attention_mask, n_tokens, past).bool()
    elif attention_mask.ndim == 4:
        counted = _diagonal(attention_mask, n_tokens, past)
    else:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: give a 2-D or 4-D mask")
    counted = counted.expand(batch, n_tokens)
    return None if counted.all() else counted


def first_copies(counted: Tensor | None, shape: tuple[int, int], copies: int) -> Tensor:
    """``counted`` without the second and later copies of each prompt: beams must not count its tokens again."""
    first = torch.arange(shape[0], dtype=torch.int64, device="cpu" if counted is None else counted.device)
    first = (first % copies == 0).unsqueeze(-1).expand(shape)
    return first if counted is None else counted & first


def _last_columns(mask: Tensor, n_tokens: int, past: int) -> Tensor:
    """Columns of the new tokens: a mask may cover the cache, a longer static cache, or the new tokens alone."""
    if mask.shape[-1] >= past + n_tokens:
        return mask[..., past : past + n_tokens]
    return mask[..., -n_tokens:]


def _diagonal(mask: Tensor, n_tokens: int, past: int) -> Tensor:
    """A token counts if it may attend to itself: padding tokens may not."""
    square = _last_columns(mask[:, 0], n_tokens, past)
    own = square.diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2


def _block_diagonal(mask: BlockMask, batch: int, n_tokens: int, past: int) -> Tensor:
    # a prepared BlockMask's function adds the cache's offset to the query's index by itself
    device = mask.kv_num_blocks.device
    rows = torch.arange(batch, dtype=torch.int64, device=device)
    columns = torch.arange(n_tokens, dtype=torch.int64, device=device)
    head = torch.zeros((), dtype=torch.int64, device=device)
    per_token = [mask.mask_mod(rows, head, column, column + past) for column in columns]
    return torch.stack([value.expand(batch) for value in per_token], dim=-1)

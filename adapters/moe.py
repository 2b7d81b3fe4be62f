"""Stacked experts: every class that transformers dispatches through its experts interface.

transformers' ``use_experts_implementation`` says how each class stores its experts (concatenated or
interleaved gate and up, transposed or not, with or without biases), so no architecture is named here.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers.integrations import moe as hf_moe

from popmm.ffn import FFNWeights

from .base import FFNSite, UnsupportedModelError, register

_MARKS = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated")
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "top_k")


class ExpertsAdapter:
    """Modules with 3-D ``gate_up_proj`` and ``down_proj`` that use transformers' experts interface."""

    def site(self, module: nn.Module, probe: bool) -> FFNSite | None:
        if not all(hasattr(module, mark) for mark in _MARKS):
            return None
        if not module.has_gate:
            raise UnsupportedModelError(
                f"{type(module).__name__} has experts without a gate: popmm prunes gated FFNs (gate, up and down)"
            )
        if getattr(module, "has_post_expert_norm", False) or getattr(module, "_is_expert_parallel", False):
            raise UnsupportedModelError(
                f"{type(module).__name__} normalises each expert's output or spreads its experts over devices: "
                "popmm does not support that yet"
            )
        return FFNSite(
            module=module,
            weights=partial(_views, module),
            combine=partial(_combine, module),
            split=partial(_split, module, dim=-1),
            n_experts=module.num_experts,
            top_k=_top_k(module),
        )


def _views(module: nn.Module) -> FFNWeights:
    def rows(w: Tensor) -> Tensor:
        return w.mT if module.is_transposed else w

    gate, up = _split(module, rows(module.gate_up_proj), dim=-2)
    gate_bias = up_bias = down_bias = None
    if module.has_bias:
        gate_bias, up_bias = _split(module, module.gate_up_proj_bias, dim=-1)
        down_bias = module.down_proj_bias
    return FFNWeights(gate, up, rows(module.down_proj), gate_bias, up_bias, down_bias)


def _split(module: nn.Module, gate_up: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    if module.is_concatenated:
        return gate_up.chunk(2, dim=dim)
    if dim == -2:
        return gate_up[..., 0::2, :], gate_up[..., 1::2, :]
    return gate_up[..., 0::2], gate_up[..., 1::2]


def _combine(module: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    if type(module)._apply_gate is hf_moe._default_apply_gate:
        return module.act_fn(gate) * up
    if module.is_concatenated:
        return module._apply_gate(torch.cat([gate, up], dim=-1))
    return module._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))


def _top_k(module: nn.Module) -> int:
    """Experts per token by the configuration; the router beside the experts has the last word."""
    for name in _TOP_K:
        value = getattr(module.config, name, None)
        if isinstance(value, int):
            return value
    return 0  # left to the router


register(ExpertsAdapter())

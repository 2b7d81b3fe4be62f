"""Stacked experts: every class that transformers dispatches through its experts interface.

transformers' ``use_experts_implementation`` says how each class stores its experts (concatenated or
interleaved gate and up, transposed or not, with or without biases), so no architecture is named here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from popmm.compat import default_apply_gate, is_expert_parallel
from popmm.kernels.grid import on_grid
from popmm.method.activations import activate
from popmm.method.expert_linear import falling_experts, routed_output
from popmm.method.ffn import FFNWeights

from .base import FFNSite, UnsupportedModelError, register
from .between import TOLERANCE, close
from .own_experts import own_experts
from .quantised import QUANTISED_CLOSE
from .quantised_experts import PROJECTIONS, PackedExperts, tells_its_values
from .weights import check_finite, is_machine_failure, why_not_readable

_MARKS = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated")
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "top_k")
_OTHER_FORM = "register an adapter for this form (entry-point group 'popmm.adapters')"
PROBE_TOKENS = 4


class ExpertsAdapter:
    """Modules with 3-D ``gate_up_proj`` and ``down_proj`` that use transformers' experts interface."""

    def site(self, module: nn.Module, probe: bool) -> FFNSite | None:
        kind = type(module).__name__
        if is_expert_parallel(module):
            raise UnsupportedModelError(
                f"{kind} spreads its experts over devices: load the model without expert parallelism"
            )
        if not all(hasattr(module, mark) for mark in _MARKS):
            return own_experts(module, probe)
        packed = None
        for name, parameter in module.named_parameters(recurse=False):
            if name in PROJECTIONS and tells_its_values(parameter):
                packed = True
                continue
            reason = "" if parameter.is_meta and type(parameter) is nn.Parameter else why_not_readable(parameter)
            if reason:
                raise UnsupportedModelError(f"{kind} has experts that cannot be read: {name} {reason}")
        missing = [name for name in (_first(module), "down_proj") if name not in module._parameters]
        if missing:
            held = ", ".join(name for name, _ in module.named_parameters(recurse=False))
            raise UnsupportedModelError(f"{kind} has experts without {' and '.join(missing)} ({held}): {_OTHER_FORM}")
        packed = PackedExperts(module) if packed else None
        if packed is not None and packed.why_unreadable():
            raise UnsupportedModelError(f"{kind} has experts that cannot be read: {packed.why_unreadable()}")
        return FFNSite(
            module=module,
            weights=partial(_views, module, packed and packed.stand_in),
            values=packed and partial(_views, module, packed.read),
            packed=packed,
            combine=partial(_combine, module),
            split=partial(_split, module, dim=-1) if module.has_gate else None,
            n_experts=module.num_experts,
            top_k=_top_k(module),
            after=partial(_after, module) if getattr(module, "has_post_expert_norm", False) else None,
        )


@torch.no_grad()
def verify_experts(site: FFNSite) -> None:
    """Compares the description of a stack of experts with the module's own output on random tokens.

    Raises:
        UnsupportedModelError: they differ, or ``top_k`` is unknown; ``BrokenWeightsError`` names weights that are
            not finite.
    """
    module, w, kind = site.module, site.read(), type(site.module).__name__
    if site.packed is None:
        check_finite(dict(module.named_parameters(recurse=False)))
    else:
        check_finite({"gate_up_proj": w.gate, "down_proj": w.down})
    generator, plain = torch.Generator("cpu").manual_seed(0), dict(dtype=torch.float32, device="cpu")
    x = torch.randn(PROBE_TOKENS, w.d_model, generator=generator, **plain).to(w.gate)
    index = falling_experts(PROBE_TOKENS, site.top_k, site.n_experts, x.device)
    weight = torch.rand(index.shape, generator=generator, **plain).to(x)
    ours = routed_output(w, site.combine, x, index, weight, site.after)
    tolerance = TOLERANCE.get(x.dtype, 1e-4) if site.packed is None else QUANTISED_CLOSE
    try:
        theirs = module(x, index, weight)
    except Exception as error:
        if is_machine_failure(error):
            raise
        if site.packed is not None:
            raise UnsupportedModelError(
                f"{kind} holds its experts as {site.packed.kind}, which do not run as the model is set "
                f"({str(error).splitlines()[0]}): model.set_experts_implementation('eager') may help, or load the "
                "model with unquantised experts"
            ) from error
        raise UnsupportedModelError(
            f"{kind} looks like stacked experts but does not run on hidden states, expert numbers and router "
            f"weights: {error}"
        ) from error
    form = "down(act(up(x)))" if w.up is None else "down(act(gate(x)) * up(x))"
    if not isinstance(theirs, Tensor) or not close(ours, theirs, tolerance):
        raise UnsupportedModelError(f"{kind} computes something other than {form} per expert: {_OTHER_FORM}")
    if site.packed is not None:
        site.packed.one_plane = w.up is not None and on_grid(w.gate) and on_grid(w.up)


def _views(module: nn.Module, stack: Callable[[str], Tensor] | None = None) -> FFNWeights:
    def rows(name: str) -> Tensor:
        w = getattr(module, name) if stack is None else stack(name)
        return w.mT if module.is_transposed else w

    gate_bias = up_bias = down_bias = None
    gate, up = _split(module, rows(_first(module)), dim=-2) if module.has_gate else (rows(_first(module)), None)
    if module.has_bias:
        bias = getattr(module, f"{_first(module)}_bias")
        gate_bias, up_bias = _split(module, bias, dim=-1) if module.has_gate else (bias, None)
        down_bias = module.down_proj_bias
    return FFNWeights(gate, up, rows("down_proj"), gate_bias, up_bias, down_bias)


def _first(module: nn.Module) -> str:
    """Name of the tensor that widens."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def _split(module: nn.Module, gate_up: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    if module.is_concatenated:
        return gate_up.chunk(2, dim=dim)
    if dim == -2:
        return gate_up[..., 0::2, :], gate_up[..., 1::2, :]
    return gate_up[..., 0::2], gate_up[..., 1::2]


def _combine(module: nn.Module, gate: Tensor, up: Tensor | None) -> Tensor:
    if up is None or type(module)._apply_gate is default_apply_gate:
        return activate(module.act_fn, gate, up)
    if module.is_concatenated:
        return module._apply_gate(torch.cat([gate, up], dim=-1))
    return module._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))


def _after(module: nn.Module, y: Tensor) -> Tensor:
    return module.post_expert_norm(y)


def _top_k(module: nn.Module) -> int:
    """Experts per token by the configuration; the router beside the experts has the last word."""
    config = getattr(module, "config", None)
    for name in _TOP_K:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return 0  # left to the router


register(ExpertsAdapter())

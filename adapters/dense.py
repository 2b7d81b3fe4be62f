"""Dense gated FFNs, recognised by their linear layers and verified by a probe.

Separate gate and up projections (Llama, Qwen, Mistral, Gemma, OLMo, ...) and one fused projection
(Phi-3, GLM-4, ...) are told apart by shapes. Which projection is the gate, and how a fused one is
arranged, is decided by comparing with the module's own output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from popmm.ffn import FFNWeights, ffn

from .base import FFNSite, UnsupportedModelError, register

PROBE_TOKENS = 3
# relative error of a correct description, by dtype: rounding of two products in a row
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class DenseAdapter:
    """FFNs whose direct children are two or three linear layers and an activation."""

    def site(self, module: nn.Module, probe: bool) -> FFNSite | None:
        candidates = list(_arrangements(module))
        if not candidates:
            return None
        found = _probe(module, candidates) if probe else candidates[0]
        if found is None:
            if not _activations(module):
                return None  # three linear layers and no activation: no FFN after all
            raise UnsupportedModelError(
                f"{type(module).__name__} has the layers of a gated FFN but computes something other than "
                "down(act(gate(x)) * up(x)): register an adapter for this form (entry-point group 'popmm.adapters')"
            )
        views, combine, down, up = found
        return FFNSite(module=module, weights=views, combine=combine, down=down, up=up)


def _arrangements(
    module: nn.Module,
) -> Iterator[tuple[Callable[[], FFNWeights], Callable, nn.Linear, nn.Linear | None]]:
    """Every reading of the module's layers as (weight views, combine, down, separate up), likeliest first."""
    children = list(module.children())
    linears = [child for child in children if isinstance(child, nn.Linear)]
    others = [child for child in children if not isinstance(child, nn.Linear)]
    if len(linears) not in (2, 3) or any(True for child in others for _ in child.parameters()):
        return
    activations = _activations(module)
    if not activations and _takes_hidden_states_alone(module) and linears[0].in_features != linears[0].out_features:
        activations = list(_INLINE)
    for activation in activations:
        combine = partial(_activate, activation)
        if len(linears) == 3:
            for gate, up, down in permutations(linears):
                if gate.weight.shape == up.weight.shape == down.weight.shape[::-1]:
                    yield partial(_separate, gate, up, down), combine, down, up
        else:
            for fused, down in (linears, linears[::-1]):
                d_model, d_ff = down.weight.shape
                if fused.weight.shape == (2 * d_ff, d_model):
                    for arrangement in _FUSED:
                        yield partial(_fused, fused, down, arrangement), combine, down, None


def _activations(module: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """Activations that the module holds, as children or as plain functions."""
    children = [c for c in module.children() if not isinstance(c, (nn.Linear, nn.Dropout))]
    return children + [value for key, value in vars(module).items() if callable(value) and key != "forward"]


# tried where a module holds no activation and so must call one in its forward
_INLINE = (F.silu, F.gelu, partial(F.gelu, approximate="tanh"), F.relu)


def _takes_hidden_states_alone(module: nn.Module) -> bool:
    """Whether ``module(x)`` is a call: attention has two or three linear layers too, but needs more."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 1


def _activate(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


def _separate(gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> FFNWeights:
    return FFNWeights(gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias)


_FUSED: tuple[Callable[[Tensor], tuple[Tensor, Tensor]], ...] = (
    lambda rows: rows.chunk(2),
    lambda rows: rows.chunk(2)[::-1],
    lambda rows: (rows[0::2], rows[1::2]),
)


def _fused(fused: nn.Linear, down: nn.Linear, arrangement: Callable) -> FFNWeights:
    gate, up = arrangement(fused.weight)
    gate_bias, up_bias = (None, None) if fused.bias is None else arrangement(fused.bias)
    return FFNWeights(gate, up, down.weight, gate_bias, up_bias, down.bias)


@torch.no_grad()
def _probe(module: nn.Module, candidates: list):
    """The arrangement that reproduces the module's own output on random tokens, or None."""
    weight = next(module.parameters())
    d_model = candidates[0][0]().d_model
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(1, PROBE_TOKENS, d_model, generator=generator, device="cpu").to(weight.device, weight.dtype)
    try:
        expected = module(x)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(module).__name__} looks like a gated FFN but does not run on hidden states alone: {error}"
        ) from error
    scale = expected.float().abs().max()
    for found in candidates:
        views, combine, *_ = found
        error = (ffn(x, views(), combine).float() - expected.float()).abs().max()
        if error <= TOLERANCE.get(weight.dtype, 1e-4) * scale:
            return found
    return None


register(DenseAdapter())

"""Activations by name, and which of them an FFN computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from popmm.method.ffn import Combine

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda g: F.relu(g).square(),
}


def activate(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor | None) -> Tensor:
    """``act(gate) * up``; ``act(gate)`` without a gate, whose first projection is given as one."""
    return activation(gate) if up is None else activation(gate) * up


def recognised(combine: Combine, device: torch.device, gated: bool = True) -> str | None:
    """The name of the activation if ``combine(g, u)`` is ``act(g) * u`` and nothing else, told by its values.

    Args:
        gated: whether there is an u; without, ``combine(g, None)`` is ``act(g)``.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        g = torch.linspace(-30, 30, 1201, dtype=torch.float32, device=device)
        u = torch.linspace(40, -3, 1201, dtype=torch.float32, device=device)
        u = u if gated else None
        found: Tensor = combine(g, u)
        for name, activation in ACTIVATIONS.items():
            if found.shape == g.shape and torch.allclose(found, activate(activation, g, u), rtol=1e-5, atol=1e-6):
                return name
    return None

"""Experts by plain means: their tensors as the module's own forward reads them, and the tokens routed to them."""

from __future__ import annotations

from contextlib import contextmanager

import independent


def experts_of(model):
    """Name to experts module, in layer order."""
    return {name: m for name, m in model.named_modules() if type(m).__name__.endswith("Experts")}


def expert_h(module, expert, x):
    """h ``[n, d_ff]`` of one expert by the module's own stacked weights."""
    w = module.gate_up_proj[expert]
    gate_up = x @ (w if module.is_transposed else w.T)
    if module.has_bias:
        gate_up = gate_up + module.gate_up_proj_bias[expert]
    return module._apply_gate(gate_up)


def expert_down(module, expert):
    """down ``[d_model, d_ff]``."""
    w = module.down_proj[expert]
    return w.T if module.is_transposed else w


@contextmanager
def routed(model):
    """Yields {name: list of (x, index, weight)} seen by the experts modules."""
    seen = {name: [] for name in experts_of(model)}

    def keep(name):
        return lambda module, args: seen[name].append(tuple(a.detach().clone() for a in args))

    with independent.pre_hooks((m, keep(name)) for name, m in experts_of(model).items()):
        yield seen

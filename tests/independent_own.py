"""Experts outside transformers' experts interface by plain means: each family's weights and routing by name."""

from __future__ import annotations

from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Plain(NamedTuple):
    """One family: gate, up and down of an expert, and which rows of x go to which experts with which weights."""

    kind: str  # the class that is called
    weights: object  # (module, expert) -> gate [f, d], up [f, d], down [d, f]
    routes: object  # (module, *args) -> [(row, expert, weight)]
    rest: object = lambda m, x, *routed: 0  # what is added to the output
    after: object = lambda m, y: y  # of each expert's output
    combine: object = lambda m, gate, up: F.silu(gate) * up


def _given(m, x, index, weight):
    return [(t, int(e), w) for t in range(len(index)) for e, w in zip(index[t], weight[t])]


def _fused(m, e):
    return *m.gate_up_proj[e].chunk(2), m.down_proj[e]


def _dbrx(m, e):
    n = m.ffn_hidden_size
    w1, v1, w2 = (w[e * n : (e + 1) * n] for w in (m.mlp.w1, m.mlp.v1, m.mlp.w2))
    return w1, v1, w2.T


def _jetmoe_routes(m, x):
    values, experts = m.router.layer(x.flatten(0, -2)).topk(m.router.top_k, dim=-1)
    return _given(m, x, experts, values.softmax(-1))


def _llama4_routes(m, x):
    n = len(x) // 4
    return [(row, row // n, 1.0) for row in range(len(x)) if x[row].any()]


def _longcat_rest(m, x, index, weight):
    return x * torch.where(index >= 4, weight, 0).sum(-1, keepdim=True)


def _step(m, gate, up):
    return F.silu(gate).clamp(max=m.limit) * up.clamp(-m.limit, m.limit)


PLAIN = {
    "dbrx": Plain("DbrxExperts", _dbrx, _given),
    "jetmoe": Plain(
        "JetMoeMoE",
        lambda m, e: (*m.input_linear.weight[e].chunk(2), m.output_linear.weight[e]),
        _jetmoe_routes,
        rest=lambda m, x: m.bias,
    ),
    "llama4_text": Plain(
        "Llama4TextExperts", lambda m, e: (*m.gate_up_proj[e].T.chunk(2), m.down_proj[e].T), _llama4_routes
    ),
    "longcat_flash": Plain(
        "LongcatFlashExperts", _fused, lambda *args: [p for p in _given(*args) if p[1] < 4], rest=_longcat_rest
    ),
    "step3p7": Plain("Step3p7Experts", _fused, _given, combine=_step),
    "inkling_text": Plain(
        "InklingSharedExperts",
        lambda m, e: (m.gate_proj[e], m.up_proj[e], m.down_proj[e]),
        lambda m, x, gammas: [(t, e, w) for t, row in enumerate(gammas.flatten(0, -2)) for e, w in enumerate(row)],
    ),
    "muse_spark": Plain("MuseSparkExperts", _fused, _given, after=lambda m, y: m.post_expert_norm(y)),
}  # fmt: skip


def modules_of(model, plain):
    return {name: m for name, m in model.named_modules() if type(m).__name__ == plain.kind}


def h_of(plain, m, e, x):
    """h ``[n, f]`` of one expert."""
    gate, up, _ = plain.weights(m, e)
    return plain.combine(m, x @ gate.T, x @ up.T)


def dense_output(plain, m):
    """An expert's output ``[d]`` from (expert, x ``[1, d]``)."""
    return lambda e, x: plain.weights(m, e)[2] @ h_of(plain, m, e, x)[0]


def by_loops(plain, m, args, expert_output):
    """What the module returns, each expert's output ``[d]`` given by ``expert_output(e, x [1, d])``."""
    flat = args[0].reshape(-1, args[0].shape[-1])
    out = torch.zeros_like(flat)
    for row, e, w in plain.routes(m, *args):
        out[row] += w * plain.after(m, expert_output(e, flat[row : row + 1]))
    return out.view(args[0].shape) + plain.rest(m, *args)


@contextmanager
def called(model, plain):
    """Yields {name: list of (arguments, output) of each call}."""
    modules = modules_of(model, plain)
    seen = {name: [] for name in modules}

    def keep(name):
        def hook(m, args, kwargs, output):
            seen[name].append((tuple(a.detach().clone() for a in (*args, *kwargs.values())), output.detach().clone()))

        return hook

    handles = [m.register_forward_hook(keep(name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()

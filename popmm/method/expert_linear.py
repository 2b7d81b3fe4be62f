"""A linear layer per row, each with the weights of its own expert, read in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from popmm import kernels
from popmm.compat import grouped_mm
from popmm.kernels.precision import without_autocast
from popmm.method.ffn import FFNWeights


def expert_linear(x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y[s] = weight[experts[s]] @ x[s] (+ bias[experts[s]])``.

    In the weight's dtype, under autocast too. No expert's matrix is copied. Few rows, most of which have an expert to
    themselves, are computed one by one by ``kernels.block_dot``; many in groups by expert. Static shapes; no
    synchronisation on an accelerator.

    Args:
        x: rows ``[n_rows, d_in]``.
        weight: ``[n_experts, d_out, d_in]``, any strides.
        experts: int64 ``[n_rows]``.
        bias: ``[n_experts, d_out]``.
    """
    x = x.to(weight.dtype)
    with without_autocast(x.device):
        if x.device.type == "cpu":
            y = _on_cpu(x, weight, experts) if torch.compiler.is_compiling() else _each(x, weight, experts)
        elif x.is_cuda and _are_few(experts, weight) and weight.stride(-1) == 1:
            y = kernels.block_dot(weight, x, experts)
        else:
            y = _grouped(x, weight, experts)
    return y if bias is None else y + bias[experts]


def mixed(y: Tensor, weight: Tensor, x: Tensor, after: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Outputs of all (token, choice) pairs, summed over a token's experts by router weight, in x's dtype.

    Args:
        y: ``[n_tokens * k, d_model]``.
        weight: ``[n_tokens, k]``.
        after: what each output goes through before it is weighted, such as a norm.
    """
    y = y if after is None else after(y)
    return (y * weight.flatten().unsqueeze(-1)).view(*weight.shape, -1).sum(dim=1).to(x.dtype)


Combine = Callable[[Tensor, Tensor | None], Tensor]  # (gate, up) -> h


def routed_hidden(w: FFNWeights, combine: Combine, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
    """h of all (token, choice) pairs ``[n_tokens * k, d_ff]`` in natural order, and the up projection.

    Args:
        x: ``[n_tokens, d_model]``.
        index: experts, int64 ``[n_tokens, k]``.
    """
    experts, pairs = index.flatten(), x.repeat_interleave(index.shape[-1], dim=0)
    gate = expert_linear(pairs, w.gate, experts, w.gate_bias)
    up = None if w.up is None else expert_linear(pairs, w.up, experts, w.up_bias)
    return combine(gate, up), up


def routed_down(
    h: Tensor, w: FFNWeights, index: Tensor, weight: Tensor, x: Tensor, after: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Down projection of h ``[n_tokens * k, n]``, summed over a token's experts by router weight, in x's dtype."""
    return mixed(expert_linear(h, w.down, index.flatten(), w.down_bias), weight, x, after)


def routed_output(
    w: FFNWeights,
    combine: Combine,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    after: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What experts make of tokens x ``[n, d_model]`` that are routed to ``index`` with ``weight`` (``[n, k]``)."""
    return routed_down(routed_hidden(w, combine, x, index)[0], w, index, weight, x, after)


def falling_experts(n_tokens: int, k: int, n_experts: int, device: torch.device) -> Tensor:
    """Experts of a trial, int64 ``[n_tokens, k]``: falling numbers, so that no two row orders look alike."""
    here = dict(dtype=torch.int64, device="cpu")
    choice = torch.arange(n_tokens, **here)[:, None] + torch.arange(k, **here)
    return (-1 - choice).remainder(n_experts).to(device)


def _are_few(rows: Tensor, weight: Tensor) -> bool:
    return 2 * len(rows) <= len(weight)


def _each(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    if _are_few(experts, weight) and kernels.reads_blocks(weight):
        return kernels.block_dot(weight, x, experts)
    y = x.new_empty(x.shape[0], weight.shape[1])
    rows_of: dict[int, list[int]] = {}
    for row, expert in enumerate(experts.tolist()):
        rows_of.setdefault(expert, []).append(row)
    for expert, rows in rows_of.items():
        if len(rows) == 1:
            row = rows[0]
            y[row] = F.linear(x[row : row + 1], weight[expert])[0]  # faster than a vector
        else:
            index = torch.tensor(rows, dtype=torch.int64, device="cpu")
            y[index] = F.linear(x[index], weight[expert])
    return y


# opaque to torch.compile, which could not trace the data-dependent loop
_on_cpu = torch.library.custom_op("popmm::expert_linear", _each, mutates_args=())


@_on_cpu.register_fake
def _(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _grouped(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    ordered, order = experts.sort(stable=True)
    counts = torch.zeros(weight.shape[0], dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, ordered, torch.ones_like(ordered, dtype=torch.int32))
    offsets = counts.cumsum(0, dtype=torch.int32)
    y = grouped_mm(x[order], weight.mT, offsets)
    return torch.empty_like(y).index_copy_(0, order, y)

"""The method written out token by token, channel by channel: slow, and what the tests compare with.

Nothing here is used by the library itself. Loops stand where the paper has indices; no layout, no
gathering, no vectorised selection.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def token_score(importance: str, h: Tensor, down: Tensor) -> list[float]:
    """Score of each channel for one token, from its activations h ``[d_ff]`` and down ``[d_model, d_ff]``."""
    magnitudes = h.double().abs().tolist()
    norms = down.double().square().sum(0).sqrt().tolist()
    length = sum(m * m for m in magnitudes) ** 0.5 or 1.0
    if importance == "wanda":
        return [m * norm for m, norm in zip(magnitudes, norms)]
    if importance == "griffin":
        return [m / length for m in magnitudes]
    if importance == "flock":
        return [m * norm / length for m, norm in zip(magnitudes, norms)]
    raise ValueError(importance)


def prompt_importance(importance: str, h: Tensor, down: Tensor) -> list[float]:
    """Score of each channel over the prompt tokens h ``[n_tokens, d_ff]`` (paper, eq. 1-3)."""
    per_token = [token_score(importance, row, down) for row in h]
    return [sum(row[i] ** 2 for row in per_token) ** 0.5 for i in range(h.shape[1])]


def partition(scores: list[float], budget: int, candidate_fraction: float) -> tuple[list[int], list[int], list[int]]:
    """Retained, candidate and pruned channels, each by falling score, ties to the lower number."""
    d_ff = len(scores)
    order = sorted(range(d_ff), key=lambda i: (-scores[i], i))
    candidates = min(round(candidate_fraction * d_ff), 2 * min(budget, d_ff - budget))
    retained = budget - candidates // 2
    return order[:retained], order[retained : retained + candidates], order[retained + candidates :]


def decode_mask(
    h: Tensor, down: Tensor, retained: list[int], candidate: list[int], budget: int, importance: str = "wanda"
) -> Tensor:
    """Which channels pass for one token, bool ``[d_ff]``: all of R, the best ``budget - |R|`` of C."""
    scores = token_score(importance, h, down)
    best = sorted(candidate, key=lambda i: -scores[i])[: budget - len(retained)]
    mask = torch.zeros(h.numel(), dtype=torch.bool, device=h.device)
    mask[retained + best] = True
    return mask


def pruned_ffn(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor], mask_of: Callable
) -> Tensor:
    """Gated FFN of tokens x ``[n_tokens, d_model]`` in which ``mask_of(h)`` says what passes for each token."""
    rows = []
    for token in x:
        h = act(gate @ token) * (up @ token)
        rows.append(down @ (h * mask_of(h)))
    return torch.stack(rows)

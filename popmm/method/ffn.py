"""FFN arithmetic: pure functions on tensors, for one FFN or for a stack of experts.

Channels are indices of ``d_ff``. A gated FFN computes ``h = combine(W_gate x, W_up x)`` and
``y = W_down h``, where ``combine(g, u)`` is ``act(g) * u`` nearly everywhere. An FFN without a gate is one whose ``up``
is the constant 1: its first projection stands as ``gate``, there is no ``up``, and ``combine(g, None)`` is ``act(g)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from popmm import kernels


class FFNWeights(NamedTuple):
    """Weights of one FFN, or of ``E`` experts stacked along a leading dimension."""

    gate: Tensor  # [(E,) d_ff, d_model]; the first projection of an FFN without a gate
    up: Tensor | None  # [(E,) d_ff, d_model]; None without a gate
    down: Tensor  # [(E,) d_model, d_ff]
    gate_bias: Tensor | None = None  # [(E,) d_ff]
    up_bias: Tensor | None = None  # [(E,) d_ff]
    down_bias: Tensor | None = None  # [(E,) d_model]

    @property
    def d_ff(self) -> int:
        return self.gate.shape[-2]

    @property
    def d_model(self) -> int:
        return self.gate.shape[-1]

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """Gate, up if there is one, and down."""
        return tuple(w for w in (self.gate, self.up, self.down) if w is not None)

    def by_channel(self) -> list[Tensor]:
        """Gate rows, up rows, down columns and the biases there are, detached, ``[(E,) d_ff, ...]`` each."""
        own = (self.gate, self.up, self.down.mT, self.gate_bias, self.up_bias)
        return [t.detach() for t in own if t is not None]

    def bytes_per_channel(self) -> int:
        """Bytes of one channel: its gate row, its up row, its down column."""
        return sum(w.element_size() for w in self.matrices) * self.d_model


Combine = Callable[[Tensor, Tensor | None], Tensor]


def hidden(x: Tensor, weights: FFNWeights, combine: Combine, linear: Callable = F.linear) -> Tensor:
    """Channel activations h ``[..., d_ff]`` of tokens x ``[..., d_model]``.

    Args:
        linear: ``F.linear``, or a decode step's (``kernels.linear``).
    """
    return combine(linear(x, weights.gate, weights.gate_bias), up_values(x, weights, linear))


def hollow(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a shape that holds a single number, NaN: weights of which nobody is to use the values."""
    return torch.full((1,) * len(shape), torch.nan, dtype=dtype, device=device).expand(shape)


def up_values(x: Tensor, weights: FFNWeights, linear: Callable = F.linear) -> Tensor | None:
    """The up projection ``[..., d_ff]`` in the dtype of x, None without a gate."""
    return None if weights.up is None else linear(x, weights.up.to(x.dtype), weights.up_bias)


def project_down(h: Tensor, weights: FFNWeights, linear: Callable = F.linear) -> Tensor:
    """h ``[..., d_ff]`` to y ``[..., d_model]``."""
    return linear(h, weights.down, weights.down_bias)


def ffn(x: Tensor, weights: FFNWeights, combine: Combine) -> Tensor:
    """The dense FFN: x ``[..., d_model]`` to y ``[..., d_model]``."""
    return project_down(hidden(x, weights, combine), weights)


def best(scores: Tensor, k: int) -> Tensor:
    """Mask of the k highest scores along the last dimension: exactly k per row, ties to the lower index."""
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.device.type == "cpu":
        index = kernels.choose(scores.reshape(-1, scores.shape[-1]), k).view(*scores.shape[:-1], k)
    else:
        index = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)


def select(
    h: Tensor, score: Callable, down_norm: Tensor, retained: int, budget: int, choose: Callable = best
) -> Tensor:
    """Which of the channels in reading order [R | C] pass for each token (paper, decode step).

    Args:
        h: activations of retained, then candidate channels, ``[n_tokens, |R| + |C|]``.
        score: token score, see ``popmm.method.importance``.
        down_norm: ``||W_down[:, i]||`` of the same channels, float32, broadcastable to ``h``.
        retained: |R|, always on.
        budget: K, how many channels pass.
        choose: which of the scored candidates pass.

    Returns:
        bool ``[n_tokens, |R| + |C|]``, with ``best`` exactly K True in each row.
    """
    candidates = score(h[..., retained:].float(), down_norm[..., retained:])
    on = torch.ones_like(h[..., :retained], dtype=torch.bool)
    return torch.cat([on, choose(candidates, budget - retained)], dim=-1)


def fill_in(h: Tensor, passing: Tensor, mean: Tensor | None) -> Tensor:
    """h ``[..., n]`` in which channels that do not pass are zero, or their prompt mean (broadcastable to h)."""
    return h.masked_fill(~passing, 0.0) if mean is None else torch.where(passing, h, mean)


def down_norm(down: Tensor) -> Tensor:
    """``||W_down[:, i]||_2``, float32 ``[(E,) d_ff]``, from down ``[(E,) d_model, d_ff]``."""
    accumulate = torch.promote_types(down.dtype, torch.float32)
    return torch.linalg.vector_norm(down, dim=-2, dtype=accumulate).float()


def identity(w: Tensor) -> tuple:
    """What changes when a tensor is moved, replaced or written."""
    return w.device, w.dtype, w.data_ptr(), None if w.is_inference() else w._version


def identities(weights: FFNWeights) -> tuple:
    """``identity`` of all weights and biases."""
    return tuple(None if w is None else identity(w) for w in weights)


def gather(source: Tensor, index: Tensor, dim: int, out: Tensor) -> None:
    """``out = source`` taken at ``index`` along ``dim``; expert stacks have an index row per expert."""
    source = source.detach()
    if index.ndim == 1:
        if source.device.type == "cpu" and dim == -1 and source.ndim == 2 and source.element_size() == 2:
            # 5 times faster than index_select, which has no vectorised path for 16-bit columns
            columns = source.view(torch.int16).numpy(), index.numpy()
            np.take(*columns, axis=1, out=out.view(torch.int16).numpy(), mode="clip")
            return
        torch.index_select(source, dim, index.to(source.device), out=out)
        return
    for expert, row in enumerate(index):
        gather(source[expert], row, dim, out[expert])

"""How much a channel matters: scores per token, and their statistics over a prompt.

A token scores every channel from its own activations h; a prompt's importance of a channel is the L2
norm of its tokens' scores (paper, eq. 1-3). At decode the token's score alone ranks the candidates, so
prompt and decode share one definition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TokenScore = Callable[[Tensor, Tensor], Tensor]
CHUNK_ELEMENTS = 1 << 24  # bounds the float32 copy of h that the statistics need


def wanda(h: Tensor, down_norm: Tensor) -> Tensor:
    """``|h_i| * ||W_down[:, i]||`` (paper, eq. 3; Sun et al., arXiv 2306.11695)."""
    return h.abs() * down_norm


def griffin(h: Tensor, down_norm: Tensor) -> Tensor:
    """``|h_i| / ||h||`` (Dong et al., arXiv 2404.01365)."""
    return torch.nn.functional.normalize(h, dim=-1, eps=1e-30).abs()


def flock(h: Tensor, down_norm: Tensor) -> Tensor:
    """``|h_i| * ||W_down[:, i]|| / ||h||``: wanda in which every token weighs the same."""
    return griffin(h, down_norm) * down_norm


TOKEN_SCORES: dict[str, TokenScore] = {"wanda": wanda, "griffin": griffin, "flock": flock, "routed": wanda}


def token_score(importance: str | TokenScore) -> TokenScore:
    """The token score of a config's ``importance``; a callable's result is checked at each use."""
    if not callable(importance):
        return TOKEN_SCORES[importance]

    def checked(h: Tensor, down_norm: Tensor) -> Tensor:
        scores = importance(h, down_norm)
        if not isinstance(scores, Tensor) or scores.shape != h.shape:
            given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"importance callable returned {given}: it must return a tensor of h's shape {tuple(h.shape)}, "
                "one score per token and channel"
            )
        return scores

    return checked


@dataclass(frozen=True)
class ChannelStatistics:
    """Sums over the tokens that an FFN (or each of its experts) has read.

    Sums are float64 where the device has it, so that the order of tokens, padding and chunking do not
    move a ranking.
    """

    squares: Tensor  # [(E,) d_ff], sum of squared token scores
    total: Tensor  # [(E,) d_ff], sum of h
    tokens: Tensor  # int64 [] or [E]
    up_squares: Tensor | None = None  # [(E,) d_ff], sum of squares of the up projection, where it is wanted

    def __add__(self, other: ChannelStatistics) -> ChannelStatistics:
        return ChannelStatistics(
            self.squares + other.squares.to(self.squares.device),
            self.total + other.total.to(self.total.device),
            self.tokens + other.tokens.to(self.tokens.device),
            None if self.up_squares is None else self.up_squares + other.up_squares.to(self.up_squares.device),
        )

    @property
    def importance(self) -> Tensor:
        """Importance of each channel, float32 ``[(E,) d_ff]``."""
        return self.squares.sqrt().float()

    @property
    def up_rms(self) -> Tensor:
        """Root mean square of the up projection, float32 ``[(E,) d_ff]``; zero where no token was read."""
        return (self.up_squares / self.tokens.clamp(min=1).unsqueeze(-1)).sqrt().float()

    @property
    def mean(self) -> Tensor:
        """Mean activation of each channel, float32 ``[(E,) d_ff]``; zero where no token was read."""
        return (self.total / self.tokens.clamp(min=1).unsqueeze(-1)).float()


def measure(
    h: Tensor,
    score: TokenScore,
    down_norm: Tensor,
    weight: Tensor | None = None,
    experts: Tensor | None = None,
    up: Tensor | None = None,
) -> ChannelStatistics:
    """Statistics of the tokens in h.

    Args:
        h: activations ``[n_tokens, d_ff]``, any float dtype.
        score: token score.
        down_norm: ``||W_down[:, i]||``, float32 ``[d_ff]``, or ``[n_experts, d_ff]`` with ``experts``.
        weight: factor on each token's score, ``[n_tokens]``; None = 1.
        experts: the expert that each row of h belongs to, int64 ``[n_tokens]``; None = a plain FFN.
        up: outputs of the up projection ``[n_tokens, d_ff]``, where their squares are wanted too.
    """
    accumulate = torch.float32 if h.device.type == "mps" else torch.float64
    n_tokens, d_ff = h.shape
    squares = torch.zeros(down_norm.shape, dtype=accumulate, device=h.device)
    total = torch.zeros_like(squares)
    up_squares = None if up is None else torch.zeros_like(squares)
    n_rows = max(1, CHUNK_ELEMENTS // max(d_ff, 1))
    for start in range(0, n_tokens, n_rows):
        rows = slice(start, start + n_rows)
        part = h[rows].float()
        scores = score(part, down_norm if experts is None else down_norm[experts[rows]])
        if weight is not None:
            scores = scores * weight[rows, None].float()
        scores = scores.float().square()
        if experts is None:
            squares += scores.sum(0, dtype=accumulate)
            total += part.sum(0, dtype=accumulate)
            if up is not None:
                up_squares += up[rows].float().square().sum(0, dtype=accumulate)
        else:
            squares.index_add_(0, experts[rows], scores.to(accumulate))
            total.index_add_(0, experts[rows], part.to(accumulate))
            if up is not None:
                up_squares.index_add_(0, experts[rows], up[rows].float().square().to(accumulate))
    if experts is None:
        tokens = torch.tensor(n_tokens, dtype=torch.int64, device=h.device)
    else:
        tokens = torch.bincount(experts, minlength=len(down_norm))
    return ChannelStatistics(squares, total, tokens, up_squares)


def blend_with_prior(statistics: ChannelStatistics, prior: Tensor, prior_tokens: float) -> Tensor:
    """Importance of experts' channels, float32 ``[n_experts, d_ff]``, from few tokens and a prior.

    An expert that read n tokens has ``n / (n + n0)`` of its own root-mean-square token score and
    ``n0 / (n + n0)`` of the prior; one that read none has the prior alone. The prior is scaled to the
    scores of the layer's experts that did read tokens.

    Args:
        statistics: of all experts.
        prior: scores known without a prompt, float32 ``[n_experts, d_ff]``.
        prior_tokens: n0.
    """
    n = statistics.tokens.to(statistics.squares.dtype)
    own = (statistics.squares / n.clamp(min=1).unsqueeze(-1)).sqrt()
    seen = n > 0
    level = own[seen].mean() / prior[seen].to(own.dtype).mean().clamp(min=1e-30)
    level = torch.where(seen.any(), level, torch.ones_like(level))  # a router may have skipped every token
    share = torch.where(seen, n / (n + prior_tokens).clamp(min=1), torch.zeros_like(n)).unsqueeze(-1)
    return (share * own + (1 - share) * level * prior).float()

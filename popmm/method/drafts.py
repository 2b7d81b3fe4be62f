"""Drafts: which tokens of one stand, and how many to draft next.

A draft's tokens and the model's own are chosen with the same noise, position by position, and a drafted token stands
if both chose the same. So what stands is the model's own choice: of the distribution that sampling gives, and with the
noise that ``torch.multinomial`` draws for one sample, the very token that sampling without drafts gives
(an exponential race, as in Gumbel-max sampling; speculative sampling, arXiv 2302.01318, keeps the distribution alone).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

WIDEST = 6  # tokens of a draft
KEEPS = 0.9  # of what was known of acceptance and costs, from one round to the next
PRIOR = 2.0  # tokens that what is known of earlier texts counts for, at the start of one
MARGIN = 0.98  # of the dense step's time per token, below which drafting is worth it
CREDIT, ALLOWED = 2.0, 0.03  # what drafts may cost a text: in dense steps, and of each of its tokens' dense time
FIRST_PROBE = 16  # tokens after which a text that is not worth drafting is tried again; twice as many each time


def choose(scores: Tensor, noise: Tensor | None) -> Tensor:
    """Tokens ``[...]`` of processed scores ``[..., vocabulary]``: the best, or sampled by noise of Exp(1)."""
    if noise is None:
        return scores.argmax(-1)
    return (scores.softmax(-1) / noise).argmax(-1)


def accepted(drafted: Tensor, chosen: Tensor) -> Tensor:
    """How many of the drafted tokens stand, by what the model chose at their places, ``[n]``, and maybe after them."""
    n = min(len(drafted), len(chosen))
    return (drafted[:n] == chosen[:n]).long().cumprod(0).sum()


class Replay:
    """In place of ``accepted``: each token stands at a rate if those before it did, whatever the model chose."""

    def __init__(self, rate: float) -> None:
        self.rate, self._generator = rate, torch.Generator("cpu").manual_seed(0)

    def __call__(self, drafted: Tensor, chosen: Tensor) -> int:
        stands = torch.rand(len(drafted), generator=self._generator, dtype=torch.float32, device="cpu") < self.rate
        return int(stands.long().cumprod(0).sum())


def expected(rate: float, width: int) -> float:
    """Tokens that a round of ``width`` drafted ones yields, of which each stands at ``rate`` if those before did."""
    return sum(rate**i for i in range(width + 1))


@dataclass
class Costs:
    """Seconds that passes take, as they were measured last."""

    dense: float | None = None  # a step of one token
    draft: float | None = None
    verify: dict[int, float] = field(default_factory=dict)  # by tokens of the pass

    def of_verifying(self, tokens: int) -> float | None:
        """From the nearest width that was measured."""
        if not self.verify:
            return None
        return self.verify[min(self.verify, key=lambda known: (abs(known - tokens), known))]


class Pace:
    """How many tokens to draft, from the acceptance of the text at hand and the costs of passes on this machine.

    What drafts have cost a text more than dense steps is bounded: then it goes on with those until they have made up
    for it (``ALLOWED`` of their time, and ``CREDIT`` steps).
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed = fixed
        self.costs = Costs()
        self._usual = 0.9  # acceptance of the texts so far
        self.begin()

    def begin(self) -> None:
        """A new text."""
        self._stood, self._tried = self._usual * PRIOR, PRIOR
        self._idle, self._patience = 0, FIRST_PROBE
        self._measured = 0  # dense steps of this text
        self._tokens, self._loss = 0, 0.0  # decoded, and the seconds that they took more than dense steps

    @property
    def rate(self) -> float:
        return self._stood / self._tried

    def width(self) -> int:
        """Tokens to draft in the next round; 0 = a dense step."""
        if self.fixed is not None:
            return self.fixed
        costs = self.costs
        if costs.dense is None or self._measured == 0:
            return 0
        if self._loss > costs.dense * (CREDIT + ALLOWED * self._tokens):
            return 0
        if costs.draft is None or not costs.verify:
            return 2
        best = min(range(1, WIDEST + 1), key=self._per_token)
        if self._per_token(best) < MARGIN * costs.dense:
            self._idle, self._patience = 0, FIRST_PROBE
            return best
        self._idle += 1
        if self._idle <= self._patience:
            return 0
        self._idle, self._patience = 0, 2 * self._patience
        return 1 if self.rate < 0.5 else 2

    def _per_token(self, width: int) -> float:
        """Seconds per token of rounds of so many drafted ones."""
        return (width * self.costs.draft + self.costs.of_verifying(width + 1)) / expected(self.rate, width)

    def drafted(self, width: int, stood: int) -> None:
        """A round is over, in which so many of the drafted tokens stood."""
        tried = stood + (stood < width)
        self._stood, self._tried = KEEPS * self._stood + stood, KEEPS * self._tried + tried
        self._usual += 0.03 * tried * (stood / tried - self._usual)

    def took(
        self,
        tokens: int,
        dense: float | None = None,
        draft: tuple[int, float] | None = None,
        verify: tuple[int, float] | None = None,
    ) -> None:
        """Times of a round's passes, in seconds, which gave so many tokens.

        Args:
            dense: a step of one token; or
            draft, verify: so many tokens drafted, and so many read at once.
        """
        costs = self.costs
        self._tokens += tokens
        if dense is not None:
            self._measured += 1
            costs.dense = _mean(costs.dense, dense)
            return
        (drafted, drafting), (checked, checking) = draft, verify
        costs.draft = _mean(costs.draft, drafting / drafted)
        costs.verify[checked] = _mean(costs.verify.get(checked), checking)
        if costs.dense is not None:
            self._loss += drafting + checking - tokens * costs.dense


def _mean(before: float | None, new: float) -> float:
    """A running mean, in which no outlier counts for more than twice what was known."""
    if before is None:
        return new
    return 0.8 * before + 0.2 * min(new, 2 * before)


def noise_like(scores: Tensor) -> Tensor:
    """What ``torch.multinomial`` draws for one sample of each row, from the generator of the device."""
    return torch.empty_like(scores).exponential_(1)

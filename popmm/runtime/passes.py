"""How many passes of an attached model were of which kind, and why some were dense: nothing is dense in silence."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import transformers

KINDS = ("prompt", "decode", "dense")
CHECKS = "verify"


UNWIRED = "the language model's forward was replaced while attached, so popmm sees none of its passes"


class NotPrunedWarning(UserWarning):
    """An attached model ran dense where its user would expect it to be pruned."""


class Passes(Mapping[str, int]):
    """Passes of an attached model by kind, since it was attached.

    ``prompt``: read and measured; ``decode``: one token per sequence by the partition (or several, simulated);
    ``dense``: one token per sequence by all weights, for one of ``reasons``; ``verify``, where there are any: by all
    weights too, to check what was drafted, be it nothing (``lossless``, or transformers' assisted generation). Steps
    that ``generate`` compiles are counted; those of a ``torch.compile`` around the model itself are not seen.

    Attributes:
        reasons: of dense passes, how often each.
        rounds: of ``verify``, those that checked a draft of lossless decoding; the others read one token.
        drafted: tokens that lossless decoding has drafted.
        accepted: those of them that went into the text: it has one more for each ``verify``, and one for the prompt.
        by_place: of drafts' tokens by their place in the draft, (drafted, accepted).
    """

    def __init__(self) -> None:
        self._counts = dict.fromkeys(KINDS, 0)
        self.reasons: Counter[str] = Counter()
        self.drafted = self.accepted = self.rounds = 0
        self.by_place: list[tuple[int, int]] = []

    def count(self, kind: str, reason: str = "") -> None:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if reason:
            self.reasons[reason] += 1

    def drafts(self, drafted: int, accepted: int, taken: int) -> None:
        """Counts a round of lossless decoding, of which ``taken`` tokens went into the text, the model's own included.

        A text ends where it ends, also within a draft.
        """
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + taken - 1
        self.rounds += drafted > 0
        for place in range(drafted):
            if place == len(self.by_place):
                self.by_place.append((0, 0))
            tried, stood = self.by_place[place]
            self.by_place[place] = tried + (place <= accepted), stood + (place < accepted)

    @property
    def tokens_per_round(self) -> float | None:
        """Tokens that went into the text for each pass of the whole model that checked; None without any."""
        checks = self[CHECKS]
        return (checks + self.accepted) / checks if checks else None

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that stood, of those whose predecessors in the draft did; None without any."""
        tried, stood = (sum(place[k] for place in self.by_place) for k in (0, 1))
        return stood / tried if tried else None

    def add(self, other: Passes) -> None:
        """Counts what another has counted too."""
        for kind, n in other._counts.items():
            self._counts[kind] = self._counts.get(kind, 0) + n
        self.reasons.update(other.reasons)
        self.drafted, self.accepted = self.drafted + other.drafted, self.accepted + other.accepted
        self.rounds += other.rounds
        longer, shorter = sorted((self.by_place, other.by_place), key=len, reverse=True)
        padded = [*shorter, *[(0, 0)] * (len(longer) - len(shorter))]
        self.by_place = [(a + c, b + d) for (a, b), (c, d) in zip(longer, padded)]

    def since(self, before: Passes) -> Passes:
        """What was counted after a copy of this was made."""
        found = Passes()
        found._counts = {kind: n - before._counts.get(kind, 0) for kind, n in self._counts.items()}
        found.reasons = self.reasons - before.reasons
        found.drafted, found.accepted = self.drafted - before.drafted, self.accepted - before.accepted
        found.rounds = self.rounds - before.rounds
        known = [*before.by_place, *[(0, 0)] * (len(self.by_place) - len(before.by_place))]
        found.by_place = [(a - c, b - d) for (a, b), (c, d) in zip(self.by_place, known)]
        return found

    @property
    def total(self) -> int:
        return sum(self._counts.values())

    def __getitem__(self, kind: str) -> int:
        return self._counts.get(kind, 0) if kind == CHECKS else self._counts[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} {kind}" for kind, n in self._counts.items())
        reasons = "; ".join(f"{n} x {reason}" for reason, n in self.reasons.items())
        drafts = ""
        if self.drafted:
            drafts = (
                f"; {self.rounds} of the verify passes checked {self.drafted} drafted tokens, {self.accepted} accepted"
            )
        return counts + drafts + (f" ({reasons})" if reasons else "")


class GenerateWatch:
    """Follows one ``generate`` from its prompt to its first decode step, which ought to be pruned."""

    def __init__(self, drafts: bool = False) -> None:
        self.begun = drafts  # the prompt's first pass has come; a draft goes on with another's text
        self.judged = drafts
        self._form: tuple | None = None
        self._steps = 0

    def steps_like(self, form: tuple | None) -> int:
        """Counts a compiled step; how many just before it had the same form."""
        self._steps = self._steps + 1 if form is not None and form == self._form else 0
        self._form = form
        return self._steps

    def ran_eagerly(self) -> None:
        """The last step of a compiled call was not compiled after all."""
        self._form = None

    def after_prompt(self, kind: str, reason: str, prunes: bool) -> None:
        """Called with each pass that is not of a prompt: the first of them decides."""
        if not self.judged:
            self.judged = True
            if kind != "decode" and prunes:
                warn_dense(reason)


def warn_dense(reason: str) -> None:
    """One warning that decoding is not pruned, and why."""
    warnings.warn(f"popmm: decoding is dense: {reason}", NotPrunedWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """``stacklevel`` of the line outside popmm, torch and transformers that led here."""
    inside = (str(Path(torch.__file__).parent), str(Path(transformers.__file__).parent), contextlib.__file__)
    inside = (*inside, str(Path(__file__).parent))
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level

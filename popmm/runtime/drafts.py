"""What lossless decoding keeps of an attached model from one ``generate`` to the next, and the passes it makes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from popmm import compat
from popmm.method.drafts import WIDEST, Pace
from popmm.runtime.runner import Runner
from popmm.runtime.sequence import remember_length


class Drafts:
    """Drafts of an attached model, and what checks them.

    Attributes:
        paces: by whether steps are compiled, which has its own costs.
        forms: compiled passes by kind.
    """

    def __init__(self, runner: Runner, fixed: int | None) -> None:
        self.runner, self.most = runner, fixed or WIDEST
        self.paces: dict[bool, Pace] = defaultdict(lambda: Pace(fixed))
        self.forms: dict[str, Callable] = {}

    @contextmanager
    def as_kind(self, kind: str) -> Iterator[None]:
        """Inside, a pass is ``"draft"``, by the partition; or ``"verify"`` or ``"dense"``, by all weights."""
        runner, drafts = self.runner, kind == "draft"
        phase, before = runner.phase, runner.passes.total
        try:
            runner.around.kind, phase.checking = kind, not drafts
            phase.decoding = phase.step = drafts
            yield
            if runner.passes.total == before:  # compiled code does not pass by the runner
                runner.kinds.seen("decode") if drafts else runner.kinds.checked()
        finally:
            runner.around.kind, phase.checking, phase.step = "", False, False
            phase.idle(runner.partitions.active is not None)

    def why_none(self, cache: compat.Cache) -> str:
        """Makes the partition of a cache the active one; or says why its text cannot be drafted."""
        runner = self.runner
        if not runner.partitions.prunes:
            return "nothing is pruned, so there is nothing to draft with"
        return "" if runner.stateless else runner.why_not(runner.sequences.on(cache))

    @contextmanager
    def taken_back(self, cache: compat.Cache, n_tokens: int) -> Iterator[None]:
        """Takes tokens that were read inside off the cache again."""
        marks = compat.mark(cache)
        yield
        compat.undo(cache, marks, n_tokens)
        self._note(cache, n_tokens)

    def crop(self, cache: compat.Cache, n_tokens: int) -> None:
        """Takes tokens off a cache."""
        compat.crop(cache, n_tokens)
        self._note(cache, n_tokens)

    def _note(self, cache: compat.Cache, n_tokens: int) -> None:
        known = self.runner.sequences.on(cache)
        if known is not None:
            remember_length(cache, known, -n_tokens)

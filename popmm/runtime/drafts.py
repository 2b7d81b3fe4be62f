"""What lossless decoding keeps of an attached model from one ``generate`` to the next, and the passes it makes."""

from __future__ import annotations

from collections import Counter, defaultdict
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
        forms: compiled passes by kind and size of the cache.
        ran: how often each form has run.
        decode: what ``generate`` is to decode by.
    """

    def __init__(self, runner: Runner, fixed: int | None) -> None:
        self.runner, self.most = runner, fixed or WIDEST
        self.paces: dict[bool, Pace] = defaultdict(lambda: Pace(fixed))
        self.forms: dict[tuple, Callable] = {}
        self.ran: Counter[tuple] = Counter()
        self.decode: Callable | None = None

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
    def taken_back(self, cache: compat.Cache) -> Iterator[None]:
        """Takes what is read inside off the cache again, be it interrupted."""
        marks, seen = compat.mark(cache), self._seen(cache)
        try:
            compat.slide(cache)
            yield
        finally:
            self._undo(cache, marks, seen)

    @contextmanager
    def whole_or_not(self, cache: compat.Cache) -> Iterator[None]:
        """Takes what is read inside off the cache again if it is interrupted."""
        marks, seen = compat.mark(cache), self._seen(cache)
        try:
            yield
        except BaseException:
            self._undo(cache, marks, seen)
            raise

    def _seen(self, cache: compat.Cache) -> int:
        known = self.runner.sequences.on(cache)
        return 0 if known is None else known.seen

    def _undo(self, cache: compat.Cache, marks: compat.Marks, seen: int) -> None:
        compat.undo(marks)
        known = self.runner.sequences.on(cache)
        if known is not None:
            remember_length(cache, known, seen - known.seen)

    def crop(self, cache: compat.Cache, n_tokens: int) -> None:
        """Takes tokens off a cache."""
        compat.crop(cache, n_tokens)
        known = self.runner.sequences.on(cache)
        if known is not None:
            remember_length(cache, known, -n_tokens)

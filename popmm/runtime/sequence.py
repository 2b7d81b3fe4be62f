"""What popmm knows of the sequences in one key-value cache, kept on the cache itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from popmm.compat import Cache, holds_state, tokens_in
from popmm.method.modality import JointStatistics

ON_CACHE = "_popmm_sequence"
_MET = "_popmm_met"
KEPT_PASSES = 8  # prompt passes of a sequence that can be taken back when its cache is cropped


class Owner:
    """The partition state that a sequence belongs to. ``reset`` makes a new one, which knows none of the old caches."""

    def __init__(self, identity: Callable[[], dict[str, Tensor]]) -> None:
        self.identity = identity  # of the model: some numbers of each FFN's weights, by name

    def __reduce__(self):
        return Saved, (self.identity(),)


@dataclass(frozen=True, eq=False)
class Saved:
    """In place of the owner of a sequence that has been pickled: a state of an equal model takes it over."""

    identity: dict[str, Tensor]

    def fits(self, identity: dict[str, Tensor]) -> bool:
        """Whether a model has the same FFNs with the same weights, whatever their dtype."""
        return self.identity.keys() == identity.keys() and all(
            own.shape == identity[name].shape
            and torch.allclose(own, identity[name].to(own), rtol=0.0, atol=0.05 * float(own.abs().mean()))
            for name, own in self.identity.items()
        )


@dataclass
class Sequence:
    """What popmm knows of the batch of sequences in one key-value cache.

    Kept on the cache, so that it lives with it, is copied with it (a deep copy of a cached prompt prefix is a common
    way to serve many questions about one text), and is saved and loaded with it (``torch.save(cache, file)``).
    """

    owner: Owner | Saved
    statistics: dict[str, JointStatistics] = field(default_factory=dict)  # by FFN name
    tokens: int = 0  # per sequence, that its prompt passes counted at most
    version: int | None = None  # of the cache's length tensor, after the last pass
    earlier: list[tuple[int, dict[str, JointStatistics], int]] = field(
        default_factory=list
    )  # (pass's start, before it)
    steps: int = 0  # decoded since the statistics grew
    refreshing: bool = False  # the last of ``earlier`` was a refresh
    seen: int = 0  # tokens per sequence that passed, for caches that do not count them

    def __deepcopy__(self, memo: dict) -> Sequence:
        return self._copy(self.owner)

    def __reduce__(self):
        state = (self.owner, dict(self.statistics), self.tokens, None, list(self.earlier), self.steps, self.refreshing)
        return Sequence, (*state, self.seen)

    def _copy(self, owner: Owner | Saved) -> Sequence:
        earlier = list(self.earlier)
        return Sequence(
            owner, dict(self.statistics), self.tokens, None, earlier, self.steps, self.refreshing, self.seen
        )

    def crop(self, past: int) -> None:
        """Forgets the passes that a cache cropped to ``past`` tokens no longer holds any token of."""
        while self.earlier and self.earlier[-1][0] >= past:
            _, self.statistics, self.tokens = self.earlier.pop()
            self.steps, self.refreshing = 0, False

    def add(self, past: int, tokens: int, statistics: dict[str, JointStatistics], refreshes: bool = False) -> None:
        """Keeps a pass that began after ``past`` tokens. Refreshes in a row count as one that began with the first.

        Args:
            tokens: how many it counted, over all sequences.
        """
        if not (refreshes and self.refreshing):
            self.earlier = [*self.earlier, (past, self.statistics, self.tokens)][-KEPT_PASSES:]
        self.statistics = {**self.statistics, **statistics}
        self.tokens += tokens
        self.steps, self.refreshing = 0, refreshes

    @property
    def has_tokens(self) -> bool:
        return any(s.has_tokens for s in self.statistics.values())


class Sequences:
    """The sequences of one partition state, each on its cache."""

    def __init__(self, identity: Callable[[], dict[str, Tensor]]) -> None:
        self._owner = Owner(identity)

    def new(self) -> Sequence:
        return Sequence(self._owner)

    def on(self, cache: Cache | None) -> Sequence | None:
        """What is known of a cache's prompt; one that was saved with its cache, by an equal model, is taken over."""
        sequence = getattr(cache, ON_CACHE, None)
        if sequence is None or sequence.owner is self._owner:
            return sequence
        if isinstance(sequence.owner, Saved) and sequence.owner.fits(self._owner.identity()):
            return self.put(cache, sequence._copy(self._owner))
        return None

    def crop(self, cache: Cache | None, known: Sequence) -> bool:
        """Follows a cache that was cropped; whether that took part of its prompt. Reads no length from a device."""
        length = tokens_in(cache)
        if not known.earlier or length is None or (isinstance(length, Tensor) and length.device.type != "cpu"):
            return False
        before = known.statistics
        known.crop(int(length))
        return known.statistics is not before

    def is_new_stranger(self, cache: Cache) -> bool:
        """Whether this is the first step seen on a cache of which nothing is known."""
        met = getattr(cache, _MET, None) is self._owner
        setattr(cache, _MET, self._owner)
        return not met

    def put(self, cache: Cache, sequence: Sequence) -> Sequence:
        setattr(cache, ON_CACHE, sequence)
        return sequence

    def load(self, cache: Cache, saved: Sequence) -> None:
        """Gives a cache what was saved of it.

        Raises:
            ValueError: by another model.
        """
        owner = saved.owner
        identity = owner.identity if isinstance(owner, Saved) else owner.identity()
        if owner is not self._owner and not Saved(identity).fits(self._owner.identity()):
            raise ValueError("these statistics are of another model: its FFNs or their weights differ")
        self.put(cache, saved._copy(self._owner))


def past_tokens(cache: Cache | None, known: Sequence | None) -> int:
    """Tokens in the cache before a pass. Reads a static cache's length from its device."""
    length = tokens_in(cache)
    if length is None:
        return (known.seen if known is not None else 1) if holds_state(cache) else 0
    return int(length)


def has_past(cache: Cache | None, known: Sequence | None) -> bool:
    """Whether the cache holds tokens before a one-token pass.

    A static cache keeps its length on the device, and reading it would make a decode step wait. So it is
    read only if someone other than our last pass has touched it, which its version counter tells.
    """
    length = tokens_in(cache)
    on_device = isinstance(length, Tensor) and length.device.type != "cpu"
    if on_device and known is not None and known.version is not None and _version(length) == known.version:
        return True
    return past_tokens(cache, known) > 0


def remember_length(cache: Cache | None, sequence: Sequence, n_tokens: int) -> None:
    """Notes the state of the cache's length after a pass of so many tokens per sequence, see ``has_past``."""
    length = tokens_in(cache)
    sequence.version = _version(length) if isinstance(length, Tensor) else None
    sequence.seen += n_tokens


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version

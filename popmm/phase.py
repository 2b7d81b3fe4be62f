"""Which pass is this, prefill or decode, and which of its tokens count.

A pass is prefill when it starts a sequence (empty cache) or brings several tokens, and decode when it
brings one token per sequence to a partitioned model. A prefill pass on a cache that already holds tokens
(chat turns, chunked prefill, assisted verification) adds to the statistics of that cache.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from popmm.modality import JointStatistics, token_groups
from popmm.padding import counted_tokens, first_copies
from popmm.permute import PermuteLayout

if TYPE_CHECKING:
    from popmm.site import PrunedSite

_ON_CACHE = "_popmm_sequence"
KEPT_PASSES = 8  # prompt passes of a sequence that can be taken back when its cache is cropped


@dataclass
class Sequence:
    """What popmm knows of the batch of sequences in one key-value cache.

    Kept on the cache itself, so that it lives, and is copied, with it (a deep copy of a cached prompt
    prefix is a common way to serve many questions about one text).
    """

    owner: object  # token of the partition state it belongs to
    statistics: dict[str, JointStatistics] = field(default_factory=dict)  # by FFN name
    version: int | None = None  # of the cache's length tensor, after the last pass
    earlier: list[tuple[int, dict[str, JointStatistics]]] = field(default_factory=list)  # (start of pass, before it)
    steps: int = 0  # decoded since the statistics grew
    refreshing: bool = False  # the last of ``earlier`` was a refresh

    def __deepcopy__(self, memo: dict) -> Sequence:
        return Sequence(self.owner, dict(self.statistics), None, list(self.earlier), self.steps, self.refreshing)

    def crop(self, past: int) -> None:
        """Forgets the passes that a cache cropped to ``past`` tokens no longer holds any token of."""
        while self.earlier and self.earlier[-1][0] >= past:
            self.statistics = self.earlier.pop()[1]
            self.steps, self.refreshing = 0, False

    def add(self, past: int, statistics: dict[str, JointStatistics], refreshes: bool = False) -> None:
        """Keeps a pass that began after ``past`` tokens. Refreshes in a row count as one that began with the first."""
        if not (refreshes and self.refreshing):
            self.earlier = [*self.earlier, (past, self.statistics)][-KEPT_PASSES:]
        self.statistics = {**self.statistics, **statistics}
        self.steps, self.refreshing = 0, refreshes

    @property
    def has_tokens(self) -> bool:
        return any(s.has_tokens for s in self.statistics.values())


class Arguments:
    """Reads a decoder's call, whatever way its arguments were given."""

    def __init__(self, forward: Callable) -> None:
        self._signature = inspect.signature(forward)

    def __call__(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        if not args:
            return kwargs
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        return {**bound, **bound.pop("kwargs", {})}


def input_shape(arguments: dict[str, Any]) -> tuple[int, int]:
    """(batch, tokens per sequence) of a decoder's call."""
    for name in ("input_ids", "inputs_embeds"):
        value = arguments.get(name)
        if value is not None:
            return value.shape[0], value.shape[1]
    raise ValueError("the language model was called with neither input_ids nor inputs_embeds")


def has_past(cache, known: Sequence | None) -> bool:
    """Whether the cache holds tokens before a one-token pass.

    A static cache keeps its length on the device, and reading it would make a decode step wait. So it is
    read only if someone other than our last pass has touched it, which its version counter tells.
    """
    length = 0 if cache is None else cache.get_seq_length()
    if not isinstance(length, Tensor) or length.device.type == "cpu":
        return int(length) > 0
    if known is not None and known.version is not None and _version(length) == known.version:
        return True
    return int(length) > 0


def remember_length(cache, sequence: Sequence) -> None:
    """Notes the state of the cache's length after a pass, see ``has_past``."""
    length = 0 if cache is None else cache.get_seq_length()
    sequence.version = _version(length) if isinstance(length, Tensor) else None


def _cache_of(output) -> Cache | None:
    """The cache that a decoder made by itself, in its output of either form."""
    if isinstance(output, tuple):
        return next((value for value in output if isinstance(value, Cache)), None)
    return getattr(output, "past_key_values", None)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


@dataclass
class PromptPass:
    """A prefill pass in progress. Nothing of it is kept unless it ends well."""

    sequence: Sequence
    shape: tuple[int, int]  # batch, tokens per sequence
    past: int  # tokens in the cache before it
    groups: dict[str, Tensor | None]  # bool [batch * n_tokens] by modality, None = every token
    refreshes: bool = False  # a decode step that is dense, for its statistics
    statistics: dict[str, JointStatistics] = field(default_factory=dict)


class Phase:
    """Follows the passes of one attached model and keeps its FFNs partitioned for the sequence at hand."""

    def __init__(self, ffns: list[PrunedSite], refresh_every: int = 0) -> None:
        self.refresh_every = refresh_every
        self.decoding = False  # read by every FFN; between passes it says what a compiled step will be
        self.prompt: PromptPass | None = None
        self.shape = (0, 0)
        self.in_prompt = False
        self.fillers: set[int] = set()  # tokens that generate feeds to rows that have ended
        self.copies = 1  # of each prompt in the batch, one after the other: beams, several sequences
        self.simulating = False
        self._read_modalities: Callable[[], dict[str, Tensor]] | None = None
        self._ffns = ffns
        self._owner = object()
        self._active: Sequence | None = None
        self._lock = threading.RLock()

    @property
    def ready(self) -> bool:
        """Whether the FFNs are partitioned."""
        return self._active is not None

    def reset(self) -> None:
        """Forgets the partition and all statistics; the next pass is a prompt."""
        with self.exclusive("reset"):
            self._owner = object()
            self._active, self.decoding = None, False
            for ffn in self._ffns:
                ffn.partition = None

    def restore(self) -> None:
        """Gives the weights their own order back and frees what decode needed; partitions stay readable."""
        self.decoding = False
        try:
            for ffn in self._ffns:
                ffn.layout.release()
        except BaseException:
            self._active = None  # some FFNs can decode no more: the model is dense until its next prompt
            raise

    def release(self) -> None:
        """Frees what decode needed; partitions stay readable."""
        for ffn in self._ffns:
            ffn.release()

    @contextmanager
    def exclusive(self, action: str) -> Iterator[None]:
        """Refuses a second thread: one model has one partition."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"{action}: another thread is running this model, which holds one partition at a time. Run its "
                "calls one after another, batch the prompts into one call, or attach a second copy of the model"
            )
        try:
            yield
        finally:
            self._lock.release()

    def run(self, forward: Callable, args: tuple, kwargs: dict, arguments: dict[str, Any]):
        """Runs one pass of the decoder in the phase that it is."""
        with self.exclusive("forward"):
            cache = arguments.get("past_key_values")
            shape = input_shape(arguments)
            if 0 in shape:
                raise ValueError(f"the prompt is empty: input of shape {shape}; give at least one token per sequence")
            known = self._sequence_of(cache)
            if self.simulating:
                if known is not None and 0 < self.refresh_every < known.steps + shape[1]:
                    raise RuntimeError(
                        f"simulated decode of {shape[1]} tokens passes a step that refresh_every={self.refresh_every} "
                        f"makes dense: split it there, after {self.refresh_every - known.steps} tokens"
                    )
                return self._decode(forward, args, kwargs, shape, cache)
            steps = shape[1] == 1 and not self.in_prompt and has_past(cache, known) and self._can_decode(known)
            refreshes = steps and known is not None and self._is_due(known)
            if steps and not refreshes:
                return self._decode(forward, args, kwargs, shape, cache)
            past = 0 if cache is None else int(cache.get_seq_length())
            counted = counted_tokens(arguments.get("attention_mask"), shape, past)
            if counted is not None and past == 0 and not self.in_prompt and not counted.any():
                raise ValueError("the prompt is empty: attention_mask leaves no token of it")
            sequence = known if past and known is not None else Sequence(self._owner)
            sequence.crop(past)
            if refreshes:
                counted = self._unfinished(arguments.get("input_ids"), counted)
            if self.copies > 1 and shape[0] % self.copies == 0:
                counted = first_copies(counted, shape, self.copies)
            groups = token_groups(counted, self._modalities(shape))
            prompt = PromptPass(sequence, shape, past, groups, refreshes)
            return self._prefill(forward, args, kwargs, prompt, cache)

    @contextmanager
    def reading_prompt(self) -> Iterator[None]:
        """Inside, passes of one token belong to a prompt (the last chunk of a chunked prefill)."""
        self.in_prompt = True
        try:
            yield
        finally:
            self.in_prompt = False

    def run_around(self, forward: Callable, args: tuple, kwargs: dict, read: Callable[[], dict[str, Tensor]]):
        """Runs the module around the decoder; ``read`` tells its image tokens, if the pass is a prompt."""
        with self.exclusive("forward"):
            before, self._read_modalities = self._read_modalities, read
            try:
                return forward(*args, **kwargs)
            finally:
                self._read_modalities = before

    def _modalities(self, shape: tuple[int, int]) -> dict[str, Tensor] | None:
        if self._read_modalities is None:
            return None
        found = self._read_modalities()
        # a model that makes several tokens of one placeholder, or a decoder called by itself inside
        return {name: positions for name, positions in found.items() if positions.shape == shape}

    def __deepcopy__(self, memo: dict):
        # a copy of the model would share its hooks with the original
        raise RuntimeError("this model is attached: call popmm.detach(model) before copying or pickling it")

    def __reduce__(self):
        self.__deepcopy__({})

    @contextmanager
    def simulated_decode(self) -> Iterator[None]:
        """Inside, passes of several tokens are decode: each token is pruned as if it came alone."""
        with self.exclusive("simulated decode"):
            if not self.ready:
                raise RuntimeError("simulated decode needs a partition: run a prompt through the model first")
            self.simulating = True
            try:
                yield
            finally:
                self.simulating = False

    def start_over(self) -> Callable[[], None]:
        """Undoes what the current partition did to the weights; returns what makes it anew."""
        sequence, self._active, self.decoding = self._active, None, False
        for ffn in self._ffns:
            if isinstance(ffn.layout, PermuteLayout):
                ffn.layout.rewind()
        return lambda: None if sequence is None else self._activate(sequence)

    def repartition(self) -> None:
        """Partitions all FFNs anew from the statistics at hand."""
        if self._active is not None:
            self._activate(self._active)

    def compiled_step(self) -> bool:
        """Counts a decode step that runs compiled, unseen from here; whether it must run by itself instead."""
        if self._active is None or self._is_due(self._active):
            return True
        self._active.steps += 1
        return False

    def _unfinished(self, ids: Tensor | None, counted: Tensor | None) -> Tensor | None:
        """Which rows of a batch count in a refresh: ``generate`` goes on feeding padding to those that have ended."""
        if ids is None or not self.fillers or len(ids) == 1:
            return counted
        goes_on = ~torch.isin(ids, torch.tensor(sorted(self.fillers), device=ids.device))
        if not goes_on.any():
            return counted
        return goes_on if counted is None else counted.to(ids.device) & goes_on

    def _is_due(self, sequence: Sequence) -> bool:
        """Whether the next decode step is the dense one that refreshes the statistics."""
        return self.refresh_every > 0 and sequence.steps >= self.refresh_every

    def _sequence_of(self, cache) -> Sequence | None:
        sequence = getattr(cache, _ON_CACHE, None)
        return sequence if sequence is not None and sequence.owner is self._owner else None

    def _can_decode(self, known: Sequence | None) -> bool:
        """Makes the partition of a known sequence the active one; an unknown cache decodes with what is there."""
        if known is None or known is self._active:
            return self.ready
        if len(known.statistics) < len(self._ffns) or not known.has_tokens:
            return False
        self._activate(known)
        return True

    def _decode(self, forward: Callable, args: tuple, kwargs: dict, shape: tuple[int, int], cache):
        self.decoding, self.shape = True, shape
        output = forward(*args, **kwargs)
        known = self._sequence_of(cache)
        if known is not None:
            known.steps += shape[1]
            remember_length(cache, known)
        return output

    def _prefill(self, forward: Callable, args: tuple, kwargs: dict, prompt: PromptPass, cache):
        self.decoding, self.prompt, self.shape = False, prompt, prompt.shape
        try:
            output = forward(*args, **kwargs)
        finally:
            self.prompt = None
            self.decoding = self.ready
        prompt.sequence.add(prompt.past, prompt.statistics, prompt.refreshes)
        cache = cache if cache is not None else _cache_of(output)
        if cache is not None:
            setattr(cache, _ON_CACHE, prompt.sequence)
            remember_length(cache, prompt.sequence)
        if len(prompt.sequence.statistics) == len(self._ffns) and prompt.sequence.has_tokens:
            self._activate(prompt.sequence)
        return output

    def _activate(self, sequence: Sequence) -> None:
        # interrupted half way, the model is left without a partition, which is dense
        self._active, self.decoding = None, False
        for ffn in self._ffns:
            ffn.apply(sequence.statistics[ffn.name])
        self._active, self.decoding = sequence, True

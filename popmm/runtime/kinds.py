"""A pass of each kind: what it tells the FFNs while it runs, and what is noted after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from popmm.compat import Cache, cache_of
from popmm.runtime.around import Around
from popmm.runtime.partitions import Partitions
from popmm.runtime.passes import CHECKS, Passes, warn_dense
from popmm.runtime.phase import Phase
from popmm.runtime.prompt import PromptPass
from popmm.runtime.sequence import Sequences, remember_length

READ_AS_PROMPT = (
    "the pass after the prompt was read as another prompt: it brought several tokens, or no key-value cache "
    "(use_cache=False)"
)
CHECKED = "assisted generation (an assistant, prompt lookup) reads several tokens at once, with all weights"


class Kinds:
    """Runs passes of one attached model, each as it is told.

    Attributes:
        sequences: of the model's caches, forgotten by ``reset``.
    """

    def __init__(self, phase: Phase, partitions: Partitions, around: Around, refresh_every: int) -> None:
        self.phase, self.partitions, self.around = phase, partitions, around
        self.refreshing = f"refreshes the partition (refresh_every={refresh_every})"
        self.passes = Passes()
        self.sequences = Sequences(partitions.identity)

    def seen(self, kind: str, reason: str = "", begins: bool = False) -> None:
        """Counts a pass, and has the ``generate`` call in progress judge it.

        Args:
            begins: whether it began a cache: a prompt, also if it is not the first of its ``generate`` (guidance).
        """
        self.passes.count(kind, reason)
        watch = self.around.watch
        if watch is not None:
            in_prompt = self.around.begins or begins
            watch.begun = True
            if not in_prompt:
                usual = CHECKED if kind == CHECKS else READ_AS_PROMPT
                watch.after_prompt(kind, reason or usual, self.partitions.prunes and not self.around.kind)

    def checked(self) -> None:
        """Counts a pass by all weights: it checks what was drafted, unless nothing can be."""
        why = self.around.why_dense if self.around.kind else ""
        self.seen("dense" if why else CHECKS, why)

    def decode(self, forward: Callable, args: tuple, kwargs: dict, shape: tuple[int, int], cache):
        self.phase.decoding, self.phase.step, self.phase.shape = True, True, shape
        output = forward(*args, **kwargs)
        known = self.sequences.on(cache)
        if known is not None:
            known.steps += shape[1]
            remember_length(cache, known, shape[1])
        self.seen("decode")
        return output

    def check(self, forward: Callable, args: tuple, kwargs: dict, shape: tuple[int, int], cache, known):
        """By all weights, and nothing of it counts as a prompt."""
        phase = self.phase
        phase.decoding, phase.step, phase.checking, phase.shape = False, False, True, shape
        try:
            output = forward(*args, **kwargs)
        finally:
            phase.checking = bool(self.around.kind)
            phase.idle(self.partitions.active is not None)
        if known is not None:
            remember_length(cache, known, shape[1])
        self.checked()
        return output

    def many(
        self,
        forward: Callable,
        args: tuple,
        kwargs: dict,
        shape: tuple[int, int],
        alone: Tensor,
        all_are: bool,
        why_dense: str,
    ):
        """Tokens of many sequences in one row: those that are alone in theirs decode, the others belong to prompts."""
        phase = self.phase
        decodes = not why_dense and all_are
        phase.decoding = phase.step = decodes
        phase.shape, phase.checking = shape, bool(why_dense)
        phase.alone, phase.votes = None, alone.float() if decodes else None
        n_alone = 0 if decodes or why_dense else int(alone.sum())
        if n_alone:
            phase.alone, phase.votes = alone, alone.new_ones(n_alone, dtype=torch.float32)
        try:
            output = forward(*args, **kwargs)
        finally:
            phase.alone, phase.votes, phase.checking, phase.step = None, None, False, False
            phase.idle(self.partitions.active is not None)
        kind = "decode" if all_are else "prompt"
        self.seen("dense" if why_dense and all_are else kind, why_dense if all_are else "")
        return output

    def dense(self, forward: Callable, args: tuple, kwargs: dict, shape: tuple[int, int], cache, reason: str):
        # the first step of a generate is judged by its watch
        is_new, watch = self.sequences.is_new_stranger(cache), self.around.watch
        if self.partitions.prunes and is_new and (watch is None or watch.judged):
            warn_dense(reason)
        self.phase.decoding, self.phase.step, self.phase.shape = False, False, shape
        # and so it stays: the next step may be compiled, past this
        output = forward(*args, **kwargs)
        self.seen("dense", reason)
        return output

    def unmeasured(self, forward: Callable, args: tuple, kwargs: dict, shape: tuple[int, int]):
        """A prompt, of which nothing is to be known."""
        phase, active = self.phase, self.partitions.active
        phase.decoding, phase.step, phase.shape = False, False, shape
        try:
            output = forward(*args, **kwargs)
        finally:
            phase.idle(active is not None)
        self.seen("prompt", begins=self.around.begins)
        return output

    def prefill(self, forward: Callable, args: tuple, kwargs: dict, prompt: PromptPass, cache: Cache | None):
        phase = self.phase
        phase.decoding, phase.step, phase.prompt, phase.shape = False, False, prompt, prompt.shape
        try:
            output = forward(*args, **kwargs)
        finally:
            phase.prompt = None
            phase.idle(self.partitions.active is not None)
        sequence = prompt.sequence
        sequence.add(prompt.past, prompt.tokens, prompt.statistics, prompt.refreshes)
        cache = cache if cache is not None else cache_of(output)
        if cache is not None:
            self.sequences.put(cache, sequence)
            remember_length(cache, sequence, prompt.shape[1])
        if sequence.has_tokens:
            self.partitions.activate(sequence)
        if prompt.refreshes:
            self.seen("dense", self.refreshing)
        else:
            self.seen("prompt", begins=prompt.past == 0 and cache is not None)
        return output

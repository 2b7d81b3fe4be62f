"""Runs each pass of an attached decoder in the phase that it is, and keeps its FFNs partitioned for the text at hand.

A pass is prefill when it starts a sequence (empty cache) or brings several tokens, and decode when it
brings one token per sequence to a partitioned model. A prefill pass on a cache that already holds tokens
(chat turns, chunked prefill) adds to the statistics of that cache. One token on a cache whose
prompt popmm has not read is neither: it runs dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from popmm.compat import CONTINUOUS_BATCHING, Cache, alone_in_pass, find_cache
from popmm.runtime.around import Around
from popmm.runtime.calls import input_shape
from popmm.runtime.kinds import Kinds
from popmm.runtime.partitions import Partitions
from popmm.runtime.passes import Passes
from popmm.runtime.phase import Phase
from popmm.runtime.prompt import PromptPass
from popmm.runtime.sequence import Sequence, Sequences, has_past, past_tokens

UNKNOWN_CACHE = (
    "popmm has not read the prompt in this cache (attached or reset in the middle of a text, or a cache built from "
    "tensors): the next pass of several tokens is read as a prompt"
)
OUTSIDE = "lossless=True drafts in model.generate, greedy or sampling one sequence; all else decodes by all weights"


class Runner:
    """Follows the passes of one attached model."""

    def __init__(self, phase: Phase, partitions: Partitions, refresh_every: int = 0, stateless: bool = False) -> None:
        self.phase, self.partitions = phase, partitions
        self.refresh_every = refresh_every
        self.stateless = stateless  # one partition, of the weights, serves every sequence
        self.around = Around()
        self.kinds = Kinds(phase, partitions, self.around, refresh_every)

    @property
    def passes(self) -> Passes:
        return self.kinds.passes

    @property
    def sequences(self) -> Sequences:
        return self.kinds.sequences

    def reset(self) -> None:
        """Forgets the partition and all statistics; the next pass of several tokens is a prompt."""
        with self.phase.exclusive.between_passes("reset"):
            self.kinds.sequences = Sequences(self.partitions.identity)
            self.partitions.forget()
            self.begin()

    def begin(self) -> None:
        """Makes the partition that needs no prompt."""
        if self.stateless:
            nothing = self.sequences.new()
            nothing.tokens = 1  # of which no FFN was given any
            self.partitions.activate(nothing)

    def run(self, forward: Callable, args: tuple, kwargs: dict, arguments: dict[str, Any]):
        """Runs one pass of the decoder in the phase that it is."""
        with self.phase.exclusive("forward", queues=True), self.phase.exclusive.one_pass():
            shape = input_shape(arguments)
            alone = alone_in_pass(arguments, shape[1])
            if alone is not None:  # continuous batching
                if not self.stateless:
                    raise RuntimeError(CONTINUOUS_BATCHING)
                if not alone[1]:
                    self.partitions.check_weights()
                if self.partitions.active is None:
                    self.begin()
                return self.kinds.many(forward, args, kwargs, shape, *alone, self._outside)
            cache = find_cache(arguments)
            if 0 in shape:
                raise ValueError(f"the prompt is empty: input of shape {shape}; give at least one token per sequence")
            known = self.sequences.on(cache)
            if self.phase.simulating:
                self.phase.votes = self.around.simulated_votes(arguments, shape, past_tokens(cache, known))
                if known is not None and 0 < self.refresh_every < known.steps + shape[1]:
                    raise RuntimeError(
                        f"simulated decode of {shape[1]} tokens passes a step that refresh_every={self.refresh_every} "
                        f"makes dense: split it there, after {self.refresh_every - known.steps} tokens"
                    )
                return self.kinds.decode(forward, args, kwargs, shape, cache)
            self.phase.votes = self.around.votes(arguments, shape)
            if self.around.kind in ("verify", "dense") or self._checks_assistant(shape, cache, known):
                return self.kinds.check(forward, args, kwargs, shape, cache, known)
            if torch.is_grad_enabled():
                forward = self.partitions.refusing_backward(forward)
            if self.stateless:
                if shape[1] > 1 or self.around.begins or self.partitions.active is None:
                    self.partitions.check_weights()
                    if self.partitions.active is None:  # it could not be made anew
                        self.begin()
                    return self.kinds.unmeasured(forward, args, kwargs, shape)
                if self._outside:
                    return self.kinds.dense(forward, args, kwargs, shape, cache, self._outside)
                return self.kinds.decode(forward, args, kwargs, shape, cache)
            if known is not None and self.sequences.crop(cache, known) and known is self.partitions.active:
                self.partitions.active = None  # part of its prompt is gone
            if shape[1] > 1 or not has_past(cache, known) or (self.around.begins and known is not None):
                prompt = self._prompt_pass(arguments, shape, cache, known)
                return self.kinds.prefill(forward, args, kwargs, prompt, cache)
            reason = self._why_dense(known)
            if reason:
                return self.kinds.dense(forward, args, kwargs, shape, cache, reason)
            if self._is_due(known):
                prompt = self._prompt_pass(arguments, shape, cache, known, refreshes=True)
                return self.kinds.prefill(forward, args, kwargs, prompt, cache)
            return self.kinds.decode(forward, args, kwargs, shape, cache)

    def run_around(self, forward: Callable, args: tuple, kwargs: dict, read: Callable[[], dict[str, Tensor]]):
        """Runs the module around the decoder; ``read`` tells its image tokens, if the pass is a prompt."""
        with self.phase.exclusive("forward", queues=True), self.around.embedding(read):
            return forward(*args, **kwargs)

    @contextmanager
    def simulated_decode(self) -> Iterator[None]:
        """Inside, passes of several tokens are decode: each token is pruned as if it came alone."""
        with self.phase.exclusive("simulated decode"):
            if self.partitions.active is None:
                raise RuntimeError("simulated decode needs a partition: run a prompt through the model first")
            self.phase.simulating = True
            try:
                yield
            finally:
                self.phase.simulating = False

    def runs_compiled(self, cache: Cache | None) -> bool:
        """Whether a compiled decode step on this cache would do: its own partition is laid out, and no refresh due."""
        if self.phase.lossless:  # such a step is dense
            return True
        active = self.partitions.active
        if self.stateless:
            return active is not None
        return active is not None and self.sequences.on(cache) is active and not self._is_due(active)

    def ran_compiled(self) -> None:
        """Counts a decode step whose compiled code does not pass by here."""
        if self.phase.lossless:
            return self.kinds.seen("dense", self._outside)
        if self.partitions.active is not None:
            self.partitions.active.steps += 1
        self.kinds.seen("decode")

    def _prompt_pass(
        self,
        arguments: dict[str, Any],
        shape: tuple[int, int],
        cache: Cache | None,
        known: Sequence | None,
        refreshes=False,
    ) -> PromptPass:
        past = past_tokens(cache, known)
        counted = self.around.counted(arguments, shape, past, refreshes)
        sequence = known if past and known is not None else self.sequences.new()
        sequence.crop(past)
        self.partitions.check_weights()
        return PromptPass(sequence, shape, past, counted, self.around.modalities(shape), refreshes)

    def _is_due(self, sequence: Sequence) -> bool:
        """Whether the next decode step is the dense one that refreshes the statistics."""
        return self.refresh_every > 0 and sequence.steps >= self.refresh_every

    @property
    def _outside(self) -> str:
        """Why a pass of lossless decoding that is none of its own is dense; empty if it is one of those."""
        return (self.around.why_dense or OUTSIDE) if self.phase.lossless and not self.around.kind else ""

    def _checks_assistant(self, shape: tuple[int, int], cache: Cache | None, known: Sequence | None) -> bool:
        """Whether this pass checks what transformers' assisted generation has drafted: no part of the prompt."""
        around = self.around
        after_prompt = around.watch is not None and around.watch.begun and not around.in_prompt
        return shape[1] > 1 and after_prompt and known is not None and past_tokens(cache, known) > 0

    def _why_dense(self, known: Sequence | None) -> str:
        """Makes the partition of a known sequence the active one; or says why this decode step cannot be pruned."""
        return (self._outside if known is not None else "") or self.why_not(known)

    def why_not(self, known: Sequence | None) -> str:
        """The same of a draft."""
        if known is None:
            return UNKNOWN_CACHE
        if known is self.partitions.active:
            return ""
        if not known.has_tokens:
            return "no token of this cache's prompt counted, so there is nothing to rank channels by"
        watch = self.around.watch
        if watch is None or not watch.begun:  # else its own prompt has seen to that
            self.partitions.check_weights()
        self.partitions.activate(known)
        return ""

"""Which pass is this, prefill or decode, and which of its tokens count.

A pass is prefill when it starts a sequence (empty cache) or brings several tokens, and decode when it
brings one token per sequence to a partitioned model. A prefill pass on a cache that already holds tokens
(chat turns, chunked prefill, assisted verification) adds to the statistics of that cache. One token on a cache whose
prompt popmm has not read is neither: it runs dense.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from popmm.compat import Cache, cache_of, find_cache
from popmm.layouts.choose import Layout
from popmm.method.budget import RegionSizes
from popmm.method.modality import JointStatistics
from popmm.method.partition import FFNPartition
from popmm.runtime.calls import input_shape, without_backward
from popmm.runtime.exclusive import Exclusive
from popmm.runtime.padding import counted_tokens, first_copies
from popmm.runtime.passes import UNWIRED, GenerateWatch, Passes, warn_dense
from popmm.runtime.prompt import PromptPass
from popmm.runtime.sequence import Sequence, Sequences, has_past, past_tokens, remember_length

UNKNOWN_CACHE = (
    "popmm has not read the prompt in this cache (attached or reset in the middle of a text, or a cache built from "
    "tensors): the next pass of several tokens is read as a prompt"
)
READ_AS_PROMPT = (
    "the pass after the prompt was read as another prompt: it brought several tokens (assisted generation, prompt "
    "lookup) or no key-value cache (use_cache=False)"
)


class Followed(Protocol):
    """What a phase needs of an FFN: ``popmm.runtime.site`` and ``experts`` have them."""

    name: str
    sizes: RegionSizes
    layout: Layout
    identity: Tensor
    partition: FFNPartition | None

    def check(self) -> bool: ...

    def apply(self, statistics: JointStatistics | None, tokens: int) -> None: ...

    def release(self) -> None: ...


class Phase:
    """Follows the passes of one attached model and keeps its FFNs partitioned for the sequence at hand."""

    def __init__(self, ffns: list[Followed], refresh_every: int = 0) -> None:
        self.refresh_every = refresh_every
        self.decoding = False  # read by every FFN; between passes it says what a compiled step will be
        self.exclusive = Exclusive()
        self.released = False  # detached: what is left of our wrappers is transparent
        self.prompt: PromptPass | None = None
        self.shape = (0, 0)
        self.in_prompt = False
        self.fillers: set[int] = set()  # tokens that generate feeds to rows that have ended
        self.copies = 1  # of each prompt in the batch, one after the other: beams, several sequences
        self.simulating = False
        self.passes = Passes()
        self.watch: GenerateWatch | None = None  # of the generate call in progress
        self._read_modalities: Callable[[], dict[str, Tensor]] | None = None
        self._ffns = ffns
        self.sequences = Sequences(self._identity)
        self._active: Sequence | None = None
        self._warned_of_hooks = self._warned_of_wires = False
        self.is_wired: Callable[[], bool] = lambda: True  # set by attach

    @property
    def running(self) -> bool:
        """Whether a pass is in progress: FFNs that are called by themselves are dense."""
        return self.exclusive.in_pass

    @property
    def ready(self) -> bool:
        """Whether the FFNs are partitioned."""
        return self._active is not None

    def _identity(self) -> dict[str, Tensor]:
        return {ffn.name: ffn.identity for ffn in self._ffns}

    def reset(self) -> None:
        """Forgets the partition and all statistics; the next pass of several tokens is a prompt."""
        with self.exclusive.between_passes("reset"):
            self.sequences = Sequences(self._identity)
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
        self.released = True
        for ffn in self._ffns:
            ffn.release()

    def run(self, forward: Callable, args: tuple, kwargs: dict, arguments: dict[str, Any]):
        """Runs one pass of the decoder in the phase that it is."""
        with self.exclusive("forward"), self.exclusive.one_pass():
            cache, shape = find_cache(arguments), input_shape(arguments)
            if 0 in shape:
                raise ValueError(f"the prompt is empty: input of shape {shape}; give at least one token per sequence")
            known = self.sequences.on(cache)
            if self.simulating:
                if known is not None and 0 < self.refresh_every < known.steps + shape[1]:
                    raise RuntimeError(
                        f"simulated decode of {shape[1]} tokens passes a step that refresh_every={self.refresh_every} "
                        f"makes dense: split it there, after {self.refresh_every - known.steps} tokens"
                    )
                return self._decode(forward, args, kwargs, shape, cache)
            if torch.is_grad_enabled():
                forward = self._with_backward_refused(forward)
            if known is not None and self.sequences.crop(cache, known) and known is self._active:
                self._active = None  # part of its prompt is gone
            if shape[1] > 1 or not has_past(cache, known) or (self._begins() and known is not None):
                return self._prefill(forward, args, kwargs, self._prompt_pass(arguments, shape, cache, known), cache)
            reason = self._why_dense(known)
            if reason:
                return self._dense(forward, args, kwargs, shape, cache, reason)
            if self._is_due(known):
                prompt = self._prompt_pass(arguments, shape, cache, known, refreshes=True)
                return self._prefill(forward, args, kwargs, prompt, cache)
            return self._decode(forward, args, kwargs, shape, cache)

    def _with_backward_refused(self, forward: Callable) -> Callable:
        """A forward whose outputs refuse gradients once the weights are stored otherwise than they were by then."""
        if any(ffn.layout.reorders for ffn in self._ffns):
            return without_backward(forward, lambda: True)
        if any(ffn.layout.name == "permute" for ffn in self._ffns):
            return without_backward(forward, lambda: self.released)
        return forward

    def _begins(self) -> bool:
        """Whether this pass belongs to the prompt of a ``generate`` call, however few tokens a kept cache leaves it."""
        return self.in_prompt or (self.watch is not None and not self.watch.begun)

    def _prompt_pass(
        self,
        arguments: dict[str, Any],
        shape: tuple[int, int],
        cache: Cache | None,
        known: Sequence | None,
        refreshes=False,
    ) -> PromptPass:
        past = past_tokens(cache, known)
        counted = counted_tokens(arguments.get("attention_mask"), shape, past)
        if counted is not None and past == 0 and not self.in_prompt and not counted.any():
            raise ValueError("the prompt is empty: attention_mask leaves no token of it")
        sequence = known if past and known is not None else self.sequences.new()
        sequence.crop(past)
        if refreshes:
            counted = self._unfinished(arguments.get("input_ids"), counted)
        if self.copies > 1 and shape[0] % self.copies == 0:
            counted = first_copies(counted, shape, self.copies)
        self._check_weights()
        return PromptPass(sequence, shape, past, counted, self._modalities(shape), refreshes)

    @contextmanager
    def reading_prompt(self) -> Iterator[None]:
        """Inside, passes of one token belong to a prompt (the last chunk of a chunked prefill)."""
        before, self.in_prompt = self.in_prompt, True
        try:
            yield
        finally:
            self.in_prompt = before

    @contextmanager
    def generating(self, copies: int, fillers: set[int], drafts: bool = False) -> Iterator[None]:
        """One ``generate`` call.

        Args:
            copies: of each prompt in its batch.
            fillers: tokens that it feeds to rows that have ended.
            drafts: whether it goes on with a text that another model decides about.
        """
        before = self.copies, self.fillers, self.watch
        watch = GenerateWatch(drafts)
        try:
            self.copies, self.fillers, self.watch = copies, fillers, watch
            yield
            if not watch.begun:
                self.warn_if_unwired()
        finally:
            self.copies, self.fillers, self.watch = before

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

    def seen(self, kind: str, reason: str = "", begins: bool = False) -> None:
        """Counts a pass, and has the ``generate`` call in progress judge it.

        Args:
            begins: whether it began a cache: a prompt, also if it is not the first of its ``generate`` (guidance).
        """
        self.passes.count(kind, reason)
        watch = self.watch
        if watch is not None:
            in_prompt = self.in_prompt or begins or not watch.begun
            watch.begun = True
            if not in_prompt:
                watch.after_prompt(kind, reason or READ_AS_PROMPT, self.prunes)

    def warn_if_unwired(self) -> None:
        """Warns once if the decoder no longer runs by way of this phase."""
        if not self._warned_of_wires and not self.is_wired():
            self._warned_of_wires = True
            warn_dense(UNWIRED)

    def decodes(self, cache: Cache | None) -> bool:
        """Whether a compiled step on this cache would read its own prompt's partition."""
        return self._active is not None and self.sequences.on(cache) is self._active

    @property
    def prunes(self) -> bool:
        """Whether anything is pruned at all."""
        return any(not ffn.sizes.is_dense for ffn in self._ffns)

    def _unfinished(self, ids: Tensor | None, counted: Tensor | None) -> Tensor | None:
        """Which rows of a batch count in a refresh: ``generate`` goes on feeding padding to those that have ended."""
        if ids is None or not self.fillers or len(ids) == 1:
            return counted
        fillers = torch.tensor(sorted(self.fillers), dtype=torch.int64, device=ids.device)
        goes_on = ~torch.isin(ids, fillers)
        if not goes_on.any():
            return counted
        return goes_on if counted is None else counted.to(ids.device) & goes_on

    def _is_due(self, sequence: Sequence) -> bool:
        """Whether the next decode step is the dense one that refreshes the statistics."""
        return self.refresh_every > 0 and sequence.steps >= self.refresh_every

    def _why_dense(self, known: Sequence | None) -> str:
        """Makes the partition of a known sequence the active one; or says why this decode step cannot be pruned."""
        if known is None:
            return UNKNOWN_CACHE
        if known is self._active:
            return ""
        if not known.has_tokens:
            return "no token of this cache's prompt counted, so there is nothing to rank channels by"
        if self.watch is None or not self.watch.begun:  # else its own prompt has seen to that
            self._check_weights()
        self._activate(known)
        return ""

    def _check_weights(self) -> None:
        """Before statistics are taken or used: the FFNs must be those that were attached."""
        hooked = [ffn.name for ffn in self._ffns if ffn.check() and not ffn.sizes.is_dense]
        if hooked and not self._warned_of_hooks:
            self._warned_of_hooks = True
            warnings.warn(
                f"popmm: hooks were added to layers of {hooked[0]} while attached: they see the prompt, and not the "
                "pruned decode steps, which read weights past the layers' calls",
                stacklevel=2,
            )

    def _decode(self, forward: Callable, args: tuple, kwargs: dict, shape: tuple[int, int], cache):
        self.decoding, self.shape = True, shape
        output = forward(*args, **kwargs)
        known = self.sequences.on(cache)
        if known is not None:
            known.steps += shape[1]
            remember_length(cache, known, shape[1])
        self.seen("decode")
        return output

    def _dense(self, forward: Callable, args: tuple, kwargs: dict, shape: tuple[int, int], cache, reason: str):
        # the first step of a generate is judged by its watch
        is_new = self.sequences.is_new_stranger(cache)
        if self.prunes and is_new and (self.watch is None or self.watch.judged):
            warn_dense(reason)
        self.decoding, self.shape = False, shape  # and so it stays: the next step may be compiled, past this phase
        output = forward(*args, **kwargs)
        self.seen("dense", reason)
        return output

    def _prefill(self, forward: Callable, args: tuple, kwargs: dict, prompt: PromptPass, cache):
        self.decoding, self.prompt, self.shape = False, prompt, prompt.shape
        try:
            output = forward(*args, **kwargs)
        finally:
            self.prompt = None
            self.decoding = self.ready
        sequence = prompt.sequence
        sequence.add(prompt.past, prompt.tokens, prompt.statistics, prompt.refreshes)
        cache = cache if cache is not None else cache_of(output)
        if cache is not None:
            self.sequences.put(cache, sequence)
            remember_length(cache, sequence, prompt.shape[1])
        if sequence.has_tokens:
            self._activate(sequence)
        if prompt.refreshes:
            self.seen("dense", f"refreshes the partition (refresh_every={self.refresh_every})")
        else:
            self.seen("prompt", begins=prompt.past == 0 and cache is not None)
        return output

    def _activate(self, sequence: Sequence) -> None:
        # interrupted half way, the model is left without a partition, which is dense
        self._active, self.decoding = None, False
        for ffn in self._ffns:
            ffn.apply(sequence.statistics.get(ffn.name), sequence.tokens)
        self._active, self.decoding = sequence, True

"""The calls that a pass runs inside of, which know of its tokens what the decoder cannot see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from popmm.method.drafts import accepted
from popmm.runtime.padding import counted_tokens, first_copies
from popmm.runtime.passes import GenerateWatch

ReadModalities = Callable[[], dict[str, Tensor]]


class Around:
    """``generate``, its chunked prompt, and the module that puts pictures among the tokens."""

    def __init__(self) -> None:
        self.in_prompt = False
        self.fillers: set[int] = set()  # tokens that generate feeds to rows that have ended
        self.copies = 1  # of each prompt in the batch, one after the other: beams, several sequences
        self.watch: GenerateWatch | None = None  # of the generate call in progress
        self.kind = ""  # of the passes of lossless decoding: "draft", "verify" or "dense"
        # how many of a draft's tokens do; on random weights measurements replay what trained ones accept
        self.stands: Callable[[Tensor, Tensor], Tensor | int] = accepted
        self.why_dense = ""  # no drafts in the generate call in progress
        self._read_modalities: ReadModalities | None = None
        self._key: tuple | None = None  # of the fillers that lie on a device

    @property
    def begins(self) -> bool:
        """Whether this pass belongs to the prompt of a ``generate`` call, however few tokens a kept cache leaves it."""
        return self.in_prompt or (self.watch is not None and not self.watch.begun)

    @contextmanager
    def reading_prompt(self) -> Iterator[None]:
        """Inside, passes of one token belong to a prompt (the last chunk of a chunked prefill)."""
        before, self.in_prompt = self.in_prompt, True
        try:
            yield
        finally:
            self.in_prompt = before

    @contextmanager
    def generating(self, copies: int, fillers: set[int], drafts: bool = False) -> Iterator[GenerateWatch]:
        """One ``generate`` call.

        Args:
            copies: of each prompt in its batch.
            fillers: tokens that it feeds to rows that have ended.
            drafts: whether it goes on with a text that another model decides about.
        """
        before = self.copies, self.fillers, self.watch, self.why_dense
        watch = GenerateWatch(drafts)
        try:
            self.copies, self.fillers, self.watch = copies, fillers, watch
            yield watch
        finally:
            self.copies, self.fillers, self.watch, self.why_dense = before

    @contextmanager
    def embedding(self, read: ReadModalities) -> Iterator[None]:
        """One call of the module around the decoder; ``read`` tells its image tokens, if the pass is a prompt."""
        before, self._read_modalities = self._read_modalities, read
        try:
            yield
        finally:
            self._read_modalities = before

    def modalities(self, shape: tuple[int, int]) -> dict[str, Tensor] | None:
        """Which tokens of the pass are of which modality but text, bool ``[batch, n_tokens]`` each."""
        if self._read_modalities is None:
            return None
        found = self._read_modalities()
        # a model that makes several tokens of one placeholder, or a decoder called by itself inside
        return {name: positions for name, positions in found.items() if positions.shape == shape}

    def counted(self, arguments: dict[str, Any], shape: tuple[int, int], past: int, refreshes: bool) -> Tensor | None:
        """Which tokens of a pass count: no padding, no second copy of a prompt, bool ``[batch, n_tokens]``; None = all.

        Raises:
            ValueError: none does, of a prompt that begins a text.
        """
        counted = counted_tokens(arguments.get("attention_mask"), shape, past)
        if counted is not None and past == 0 and not self.in_prompt and not counted.any():
            raise ValueError("the prompt is empty: attention_mask leaves no token of it")
        if refreshes:
            counted = self._unfinished(arguments.get("input_ids"), counted)
        if self.copies > 1 and shape[0] % self.copies == 0:
            counted = first_copies(counted, shape, self.copies)
        return counted

    def simulated_votes(self, arguments: dict[str, Any], shape: tuple[int, int], past: int) -> Tensor | None:
        """The same of a pass whose columns are steps, float32 ``[batch, steps]``: padding has no vote."""
        if shape[0] == 1:
            return None
        counted = counted_tokens(arguments.get("attention_mask"), shape, past)
        if counted is not None:
            return counted.float()
        given = next(t for name in ("input_ids", "inputs_embeds") if (t := arguments.get(name)) is not None)
        return torch.ones(shape, dtype=torch.float32, device=given.device)

    def votes(self, arguments: dict[str, Any], shape: tuple[int, int]) -> Tensor | None:
        """What the tokens of a batch's step count in a choice that they make together, float32 ``[batch]``.

        Rows that have ended, to which ``generate`` goes on feeding padding, have no vote. None = there is one token.
        """
        if shape[0] == 1 or shape[1] > 1:
            return None
        ids = arguments.get("input_ids")
        if ids is None:
            return torch.ones(shape[0], dtype=torch.float32, device=arguments["inputs_embeds"].device)
        votes = (~torch.isin(ids[:, 0], self._fillers_on(ids.device))).float()
        return torch.where(votes.any(), votes, torch.ones_like(votes))  # all may have chosen such a token just now

    def _fillers_on(self, device: torch.device) -> Tensor:
        key = device, frozenset(self.fillers)
        if key != self._key:
            self._key = key
            self._on_device = torch.tensor(sorted(self.fillers), dtype=torch.int64, device=device)
        return self._on_device

    def _unfinished(self, ids: Tensor | None, counted: Tensor | None) -> Tensor | None:
        """Which rows of a batch count in a refresh: ``generate`` goes on feeding padding to those that have ended."""
        if ids is None or not self.fillers or len(ids) == 1:
            return counted
        goes_on = ~torch.isin(ids, self._fillers_on(ids.device))
        if not goes_on.any():
            return counted
        return goes_on if counted is None else counted.to(ids.device) & goes_on

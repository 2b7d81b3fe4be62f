"""Lossless decoding: the pruned model drafts, one dense pass checks the draft, and the text is the dense model's own.

Both share one key-value cache: a round decodes some tokens by the partition, takes them off the cache again, and reads
them once more, all at once, with the whole model. The tokens that it would have chosen stand, and its own next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from popmm import compat
from popmm.method.drafts import accepted, choose
from popmm.runtime.clock import Stopwatch
from popmm.runtime.drafts import Drafts
from popmm.runtime.noise import Noise
from popmm.runtime.passes import warn_dense
from popmm.runtime.steps import Steps

ONE_SEQUENCE = "lossless drafting serves one sequence at a time, and this is a batch of {}"
NO_CROP = "lossless drafting takes tokens back, and this model's cache ({}) cannot"


def drafting(drafts: Drafts) -> Callable:
    """A way of decoding, to be given to ``generate`` as ``custom_generate``."""

    def decode(
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Callable,
        stopping_criteria: Callable,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        tokenizer: Any = None,  # has served to make the criteria
        **model_kwargs,
    ):
        how = (input_ids, logits_processor, stopping_criteria, generation_config)
        cache = compat.find_cache(model_kwargs)
        why = ONE_SEQUENCE.format(len(input_ids)) if len(input_ids) > 1 or synced_gpus else ""
        if not why and compat.is_static(cache) and not compat.can_crop(cache):
            why = NO_CROP.format(type(cache).__name__)
        if why:
            drafts.runner.around.why_dense = why
            return compat.sample(model)(model, *how, synced_gpus, streamer, **model_kwargs)
        return Rounds(model, drafts, *how, streamer, model_kwargs).run()

    return decode


class Rounds:
    """One ``generate`` of one sequence."""

    def __init__(
        self,
        model: nn.Module,
        drafts: Drafts,
        ids: Tensor,
        processors: Callable,
        criteria: Callable,
        config: Any,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.model, self.drafts, self.config, self.streamer = model, drafts, config, streamer
        self.ids, self.kwargs = ids, model_kwargs
        self.processors, self.criteria = processors, criteria
        self.noise = Noise() if config.do_sample else None
        keeps = config.return_dict_in_generate
        self.scores: tuple | None = () if keeps and config.output_scores else None
        self.logits: tuple | None = () if keeps and config.output_logits else None
        self.steps = Steps(model, drafts, config, model_kwargs)
        self.pace = drafts.paces[self.steps.compiles]
        self.pace.begin()
        self.watch = Stopwatch(ids.device)
        self.ends = compat.ends(config)
        # whether drafts end with the text: a device that runs ahead is not asked, unless processors wait for it anyway
        self._looks = bool(self.ends) and (ids.device.type == "cpu" or bool(processors))

    def run(self):
        self.cache = self._read_prompt()
        recording = None if self.cache is None else compat.recording(self.cache)
        try:
            self.drafting = not self._over and self._can_draft()
            with compat.optimised_for_decode(self.model):
                while not self._over:
                    self._round(self._width() if self.drafting else 0)
        finally:
            if self.cache is not None:
                compat.set_recording(self.cache, recording)
            if self.noise is not None:
                self.noise.put_back()
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids
        return compat.generated(self.ids, self.scores, self.logits, self.cache)

    def _read_prompt(self) -> compat.Cache | None:
        """Runs the prompt and takes the first token."""
        output = compat.prefill(self.model, self.ids, self.config, self.kwargs)
        logits = output.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.ids.device)
        tokens, scores = self._chosen(self.ids, logits)
        self._take(tokens, scores, logits, output)
        return compat.cache_of(output)

    def _can_draft(self) -> bool:
        why = NO_CROP.format("none that we know" if self.cache is None else type(self.cache).__name__)
        if compat.can_crop(self.cache):
            why = self.drafts.why_none(self.cache)
        if why:
            self.drafts.runner.around.why_dense = why
            warn_dense(why)
            return False
        compat.keep_past(self.cache)
        self.held = int(compat.tokens_in(self.cache))
        limits = (compat.capacity(self.cache), compat.rope_limit(self.model.config))
        self.room = min((limit for limit in limits if limit is not None), default=None)
        return True

    def _width(self) -> int:
        """Tokens to draft: no more than are wanted, and fit."""
        width = min(self.pace.width(), self.config.max_length - self.ids.shape[1] - 1)
        if self.room is not None:
            width = min(width, self.room - self.held - self.steps.widest)
        return max(0, width)

    def _draft(self, width: int) -> tuple[Tensor, dict[str, Any], Any]:
        """The text so far with up to ``width`` more tokens; what the next step is made of; the last output."""
        kwargs, ids, output = dict(self.kwargs), self.ids, None
        for place in range(width):
            output = self.steps("draft", ids, 1, kwargs)
            kwargs = compat.follow(self.model, output, kwargs, 1)
            scores = self.processors(ids, _logits(output, ids))
            token = choose(scores, None if self.noise is None else self.noise.at(place, scores))
            ids = torch.cat([ids, token[:, None]], dim=-1)
            if self._looks and int(token) in self.ends:
                break
        return ids, kwargs, output

    def _round(self, width: int) -> None:
        before, start = self.ids.shape[1], self.watch.now()
        ids, kwargs, output = self.ids, self.kwargs, None
        if width:
            with self.drafts.taken_back(self.cache):
                ids, kwargs, output = self._draft(width)
        drafted, drafted_at = ids[0, before:], self.watch.now()
        width = len(drafted)
        padding = self.steps.padding(width)
        if padding:
            ids = torch.cat([ids, ids[:, -1:].expand(1, padding)], dim=-1)
            kwargs = compat.follow(self.model, output, kwargs, padding)
        n_tokens = width + 1 + padding
        with self.drafts.whole_or_not(self.cache) if self.drafting else contextlib.nullcontext():
            output = self.steps("verify" if width else "dense", ids, n_tokens, kwargs)
            logits = _logits(output, ids, n_tokens)
            tokens, scores = self._chosen(ids[:, : before + width], logits)
            checked_at = self.watch.now()
            stood = min(int(self.drafts.runner.around.stands(drafted, tokens)), len(tokens) - 1)
        try:
            self._take(torch.cat([drafted[:stood], tokens[stood : stood + 1]]), scores, logits, output)
        finally:  # criteria and streamers are others' code
            taken = self.ids.shape[1] - before
            if self.drafting:
                self.held += taken
                self.drafts.crop(self.cache, n_tokens - taken)
            else:
                self.cache = compat.cache_of(output)
        if self.drafting:
            self.drafts.runner.passes.drafts(width, stood, taken)
        if width:
            self.pace.drafted(width, stood)
        if self.steps.warm:
            checked_in = self.watch.seconds(drafted_at, checked_at)
            if width:
                drafted_in = self.watch.seconds(start, drafted_at)
                self.pace.took(stood + 1, draft=(width, drafted_in), verify=(n_tokens, checked_in))
            else:
                self.pace.took(1, dense=checked_in)

    def _chosen(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The model's tokens ``[n]`` at the last places of ids, and their scores ``[n, vocabulary]``.

        Processors are given no text that the model would not have come to: n ends at the first token of another kind.
        """
        known, n = self.ids.shape[1], ids.shape[1] - self.ids.shape[1] + 1
        if not self.processors:
            tokens = self._choose(logits[:n])
            return tokens, logits
        tokens, rows = [], []
        for i in range(n):
            rows.append(self.processors(ids[:, : known + i], logits[i : i + 1].clone()))
            tokens.append(self._choose(rows[-1], i))
            goes_on = i + 1 < n and (self._replays or int(tokens[-1]) == int(ids[0, known + i]))
            if not goes_on or int(tokens[-1]) in self.ends:
                break
        return torch.cat(tokens), torch.cat(rows)

    @property
    def _replays(self) -> bool:
        return self.drafts.runner.around.stands is not accepted

    def _choose(self, scores: Tensor, first: int = 0) -> Tensor:
        """Tokens ``[n]`` by scores ``[n, vocabulary]`` of places from the ``first`` after the text on."""
        if self.noise is None:
            return choose(scores, None)
        if not scores.isfinite().any(-1).all() or scores.isnan().any():
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")  # as sampling says
        noise = torch.cat([self.noise.at(first + i, scores[:1]) for i in range(len(scores))])
        return choose(scores, noise)

    def _take(self, tokens: Tensor, scores: Tensor, logits: Tensor, output: Any) -> None:
        """Appends tokens until one ends the text."""
        taken = 0
        for i, token in enumerate(tokens):
            self.ids = torch.cat([self.ids, token.view(1, 1)], dim=-1)
            taken += 1
            if self.noise is not None:
                self.noise.used(1)
            if self.scores is not None:
                self.scores += (scores[i : i + 1],)
            if self.logits is not None:
                self.logits += (logits[i : i + 1],)
            if self.streamer is not None:
                self.streamer.put(token.view(1).cpu())
            self._over = bool(self.criteria(self.ids, self.scores).all())
            if self._over:
                break
        self.kwargs = compat.follow(self.model, output, self.kwargs, taken)


def _logits(output: Any, ids: Tensor, n: int = 1) -> Tensor:
    """Of the last n tokens, float32 ``[n, vocabulary]``, beside the ids."""
    return output.logits[0, -n:].to(copy=True, dtype=torch.float32, device=ids.device)

"""Lossless decoding: the pruned model drafts, one dense pass checks the draft, and the text is the dense model's own.

Both share one key-value cache: a round decodes some tokens by the partition, takes them off the cache again, and reads
them once more, all at once, with the whole model. The tokens that it would have chosen stand, and its own next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from popmm import compat
from popmm.method.drafts import choose
from popmm.runtime.clock import Stopwatch
from popmm.runtime.drafts import Drafts
from popmm.runtime.noise import Noise
from popmm.runtime.passes import warn_dense
from popmm.runtime.steps import Steps

ONE_SEQUENCE = "lossless drafting serves one sequence at a time, and this is a batch of {}"
NO_CROP = "lossless drafting takes tokens back, and this model's cache ({}) cannot"


def drafting(drafts: Drafts, streamer: Any) -> Callable:
    """A way of decoding, to be given to ``generate`` as ``custom_generate``."""

    def decode(
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Callable,
        stopping_criteria: Callable,
        generation_config: Any,
        synced_gpus: bool = False,
        **model_kwargs,
    ):
        if len(input_ids) > 1 or synced_gpus:
            drafts.runner.around.why_dense = ONE_SEQUENCE.format(len(input_ids))
            plain = compat.sample(model)
            how = (logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)
            return plain(model, input_ids, *how, **model_kwargs)
        return Rounds(
            model, drafts, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs
        ).run()

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

    def run(self):
        cache = self._read_prompt()
        if not self._over:
            self.drafting = self._can_draft(cache)
            with compat.optimised_for_decode(self.model):
                while not self._over:
                    width = self._width() if self.drafting else 0
                    self._round(cache, width)
            if self.drafting:
                compat.keep_past(cache, False)
        if self.noise is not None:
            self.noise.put_back()
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids
        return compat.generated(self.ids, self.scores, self.logits, cache)

    def _read_prompt(self) -> compat.Cache:
        """Runs the prompt and takes the first token."""
        output = compat.prefill(self.model, self.ids, self.config, self.kwargs)
        cache = compat.cache_of(output)
        logits = output.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.ids.device)
        self._take(*self._chosen(self.ids, logits), output)
        return cache

    def _can_draft(self, cache: compat.Cache) -> bool:
        if compat.can_crop(cache):
            compat.keep_past(cache, True)
        kind = "none that we know" if cache is None else type(cache).__name__
        why = self.drafts.why_none(cache) if compat.can_crop(cache) else NO_CROP.format(kind)
        if why:
            self.drafts.runner.around.why_dense = why
            warn_dense(why)
            return False
        self.room, self.held = compat.capacity(cache), int(compat.tokens_in(cache))
        return True

    def _width(self) -> int:
        """Tokens to draft: no more than are wanted, and fit."""
        width = min(self.pace.width(), self.config.max_length - self.ids.shape[1] - 1)
        if self.room is not None:
            width = min(width, self.room - self.held - self.steps.widest)
        return max(0, width)

    def _draft(self, width: int) -> tuple[Tensor, dict[str, Any], Any]:
        """The text so far with ``width`` more tokens; and what the next step is made of."""
        kwargs, ids, output = dict(self.kwargs), self.ids, None
        for place in range(width):
            output = self.steps("draft", ids, 1, kwargs)
            kwargs = compat.follow(self.model, output, kwargs, 1)
            scores = self.processors(ids, _logits(output, ids))
            token = choose(scores, None if self.noise is None else self.noise.at(place, scores))
            ids = torch.cat([ids, token[:, None]], dim=-1)
        return ids, kwargs, output

    def _round(self, cache: compat.Cache, width: int) -> None:
        before, start = self.ids.shape[1], self.watch.now()
        if width:
            with self.drafts.taken_back(cache, width):
                ids, kwargs, output = self._draft(width)
        else:
            ids, kwargs = self.ids, self.kwargs
        drafted_at = self.watch.now()
        padding = self.steps.padding(width)
        if padding:
            ids = torch.cat([ids, ids[:, -1:].expand(1, padding)], dim=-1)
            kwargs = compat.follow(self.model, output, kwargs, padding)
        output = self.steps("verify" if width else "dense", ids, width + 1 + padding, kwargs)
        tokens, scores, logits = self._chosen(ids[:, : before + width], _logits(output, ids, width + 1 + padding))
        drafted, checked_at = ids[0, before : before + width], self.watch.now()
        stood = int(self.drafts.runner.around.stands(drafted, tokens))
        taken = self._take(torch.cat([drafted[:stood], tokens[stood : stood + 1]]), scores, logits, output)
        if self.drafting:
            self.held += taken
            self.drafts.crop(cache, width + 1 + padding - taken)
            self.drafts.runner.passes.drafts(width, stood, taken)
        if width:
            self.pace.drafted(width, stood)
        if self.steps.warm:
            checked_in = self.watch.seconds(drafted_at, checked_at)
            if width:
                drafted_in = self.watch.seconds(start, drafted_at)
                self.pace.took(draft=drafted_in / width, verify=(width + 1 + padding, checked_in))
            else:
                self.pace.took(dense=checked_in)

    def _chosen(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The model's tokens ``[n]`` at the last places of ids, with their scores and logits ``[n, vocabulary]``."""
        known, n = self.ids.shape[1], ids.shape[1] - self.ids.shape[1] + 1
        logits = logits[:n]
        rows = [self.processors(ids[:, : known + i], logits[i : i + 1].clone()) for i in range(n)]
        scores = torch.cat(rows)
        noise = None
        if self.noise is not None:
            noise = torch.cat([self.noise.at(i, scores[:1]) for i in range(n)])
        return choose(scores, noise), scores, logits

    def _take(self, tokens: Tensor, scores: Tensor, logits: Tensor, output: Any) -> int:
        """Appends tokens until one ends the text; how many."""
        taken = 0
        for i, token in enumerate(tokens):
            self.ids = torch.cat([self.ids, token.view(1, 1)], dim=-1)
            taken += 1
            if self.scores is not None:
                self.scores += (scores[i : i + 1],)
            if self.logits is not None:
                self.logits += (logits[i : i + 1],)
            if self.streamer is not None:
                self.streamer.put(token.view(1).cpu())
            self._over = bool(self.criteria(self.ids, self.scores).all())
            if self._over:
                break
        if self.noise is not None:
            self.noise.used(taken)
        self.kwargs = compat.follow(self.model, output, self.kwargs, taken)
        return taken


def _logits(output: Any, ids: Tensor, n: int = 1) -> Tensor:
    """Of the last n tokens, float32 ``[n, vocabulary]``, beside the ids."""
    return output.logits[0, -n:].to(copy=True, dtype=torch.float32, device=ids.device)

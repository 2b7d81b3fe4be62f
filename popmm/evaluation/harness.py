"""lm-evaluation-harness on pruned models: ``lm_eval --model popmm --model_args pretrained=ID,pruning_ratio=0.4``.

The harness scores likelihood in one pass, which never decodes and so would measure the dense model. Here the
context is read as prompt and the continuation decoded, teacher-forced, in one pass that equals decoding
token by token. Text is generated as ever.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from popmm.attach import attach, detach
from popmm.compat import cache_argument, cache_of
from popmm.config import PopConfig
from popmm.zoo.loading import load_model

SCORING = ("decode", "prompt")
ROLLING_PROMPT = 128
_FIELDS = {field.name for field in dataclasses.fields(PopConfig)}

# (the texts, as the harness hands them over; token ids of the context; of the continuation)
Request = tuple[tuple[str, str], list[int], list[int]]


@register_model("popmm")
class PopLM(HFLM):
    """A Hugging Face model, attached.

    Args:
        pretrained: hub id, folder, ``zoo:NAME``, or a model, as for ``hf``.
        scoring: ``"decode"``: likelihood of decoded continuations; ``"prompt"``: of one prompt pass over
            context and continuation, which prunes only with ``prefill="pruned"`` (the paper's question answering).
        rolling_prompt: tokens of a text that are read as prompt, where a task scores whole texts.
        settings: fields of ``PopConfig``, then arguments of ``hf``. The prompts of a batch
            share a partition (``batch_size``, 1 unless given).
    """

    def __init__(
        self, pretrained, *, scoring: str = "decode", rolling_prompt: int = ROLLING_PROMPT, **settings
    ) -> None:
        if scoring not in SCORING:
            raise ValueError(f"scoring={scoring!r}: give one of {', '.join(map(repr, SCORING))}")
        if not isinstance(rolling_prompt, int) or rolling_prompt < 1:
            raise ValueError(f"rolling_prompt={rolling_prompt!r}: give 1 token or more")
        batch = settings.get("batch_size") or 1
        if not str(batch).isdigit() or int(batch) < 1:
            raise ValueError(f"batch_size={batch!r}: give a number, since the prompts of a batch share a partition")
        config = PopConfig(**{name: settings.pop(name) for name in _FIELDS & settings.keys()})
        if config.refresh_every and scoring == "decode":
            raise ValueError(f"refresh_every={config.refresh_every}: likelihoods are scored without it; leave it 0")
        if isinstance(pretrained, str) and pretrained.startswith("zoo:"):
            dtype = settings.get("dtype")
            pretrained, settings["tokenizer"] = load_model(pretrained, None if dtype == "auto" else dtype, "cpu")
        super().__init__(pretrained, **settings)
        if self.backend != "causal":
            raise ValueError(f"popmm prunes decoder-only models; this one is {self.backend}")
        self.scoring, self.rolling_prompt = scoring, rolling_prompt
        self._rolling = False
        self.state = attach(self.model, config)

    def detach(self) -> None:
        """Gives the model back."""
        detach(self.model)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        self._rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self._rolling = False

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.state.is_dense:  # bit for bit what the harness measures by itself
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        size = int(override_bs or self.batch_size)
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][1]), requests[i][1]))
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                for i, score in zip(batch, self._scored([requests[i] for i in batch])):
                    found[i] = score
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
                    bar.update()
        return found

    @torch.no_grad()
    def _scored(self, requests: list[Request]) -> Iterator[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is the greedy one) of a batch."""
        rows = []
        for _, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a context of {len(context)} and a continuation of {len(continuation)} tokens: give at least one "
                    f"token of each, and no more to decode than max_length={self.max_length}"
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            first = len(tokens) - len(continuation)
            if self.scoring == "prompt":
                prompt = len(tokens) - 1
            else:
                prompt = min(max(first, self.rolling_prompt if self._rolling else 1), len(tokens) - 1)
            rows.append((tokens, first, prompt))
        longest = max(prompt for _, _, prompt in rows)
        rest = max(len(tokens) - 1 - prompt for tokens, _, prompt in rows)
        ids = torch.zeros(len(rows), longest + rest, dtype=torch.int64, device="cpu")
        mask = torch.zeros_like(ids)
        for i, (tokens, _, prompt) in enumerate(rows):  # prompts end, and continuations begin, in one column
            span = slice(longest - prompt, longest - prompt + len(tokens) - 1)
            ids[i, span], mask[i, span] = torch.tensor(tokens[:-1], dtype=torch.int64, device="cpu"), 1
        logits = self._two_passes(ids.to(self.device), mask.to(self.device), longest)
        for i, (tokens, first, prompt) in enumerate(rows):
            begin = longest - prompt + first - 1
            targets = torch.tensor(tokens[first:], dtype=torch.int64, device=self.device)
            own = logits[i, begin : begin + len(targets)].log_softmax(-1, dtype=self.softmax_dtype)
            greedy = bool((own.argmax(-1) == targets).all())
            yield own.gather(1, targets[:, None]).sum().item(), greedy

    def _two_passes(self, ids: Tensor, mask: Tensor, prompt: int) -> Tensor:
        """Logits ``[batch, n, vocab]``: columns up to ``prompt`` read at once, the rest decoded."""
        where = (mask.cumsum(-1) - 1).clamp(min=0)
        first = self.model(
            input_ids=ids[:, :prompt],
            attention_mask=mask[:, :prompt],
            position_ids=where[:, :prompt],
            use_cache=True,
        )
        if prompt == ids.shape[1]:
            return first.logits
        with self.state.simulated_decode():
            rest = self.model(
                input_ids=ids[:, prompt:],
                attention_mask=mask,
                position_ids=where[:, prompt:],
                **cache_argument(self.model, cache_of(first)),
            )
        return torch.cat([first.logits, rest.logits], dim=1)

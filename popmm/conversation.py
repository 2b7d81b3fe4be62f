"""A conversation with a model about text and pictures, through its processor and chat template."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import TextStreamer

from popmm.attach import attach, detach
from popmm.compat import cache_argument, cache_of
from popmm.config import PopConfig
from popmm.runtime.clock import clocked_generate
from popmm.zoo.encoding import chat_inputs, check_chats, check_length, takes_pictures, tokenizer_of

__all__ = ["Answer", "Conversation", "chat_inputs", "check_chats", "speed", "takes_pictures", "tokenizer_of"]

if TYPE_CHECKING:
    from PIL.Image import Image

    from popmm.state import PartitionState


@dataclass
class Answer:
    """What a question got, and what it cost."""

    text: str
    n_tokens: int
    seconds_per_token: float  # of decode steps; nan if there was none
    read_again: bool  # whether the whole conversation was the prompt, not the new question alone


class Conversation:
    """Questions and answers in turn, on one kept cache.

    A question about pictures already shown is read on top of the cache. A new picture, or another
    pruning ratio, has the conversation read again from its beginning, so that the partition is that of
    everything said.
    """

    def __init__(self, model, processor, config: PopConfig | None = None, **generation) -> None:
        self.model, self.processor = model, processor
        self.generation = {"max_new_tokens": 256, "do_sample": False, **generation}
        self.messages: list[dict] = []
        self.state: PartitionState | None = None
        self._config: PopConfig | None = None
        self._waiting: list[Image] = []  # pictures that come with the next question
        self._cache = self._cached_ids = None
        self.config = config

    @property
    def config(self) -> PopConfig | None:
        """How the model prunes; None = dense. Setting it attaches the model anew."""
        return self._config

    @config.setter
    def config(self, config: PopConfig | None) -> None:
        before = self._config
        self.close()
        try:
            if config is not None:
                self.state = attach(self.model, config)
            self._config = config
        except Exception:  # raised again, once the model is as it was before
            if before is not None:
                self.state, self._config = attach(self.model, before), before
            raise

    def close(self) -> None:
        """Detaches the model."""
        if self.state is not None:
            detach(self.model)
        self.state = self._config = None
        self._forget_cache()

    def reset(self) -> None:
        """Forgets what was said and shown."""
        self.messages, self._waiting = [], []
        self._forget_cache()
        if self.state is not None:
            self.state.reset()

    def show(self, picture: Image) -> None:
        """Adds a picture to the next question."""
        if not takes_pictures(self.processor):
            raise ValueError("this model reads text alone: give a vision-language model for pictures")
        self._waiting.append(picture)

    def drop_pictures(self) -> int:
        """Forgets pictures that wait for the next question; returns how many there were."""
        n, self._waiting = len(self._waiting), []
        return n

    def ask(self, question: str, stream: bool = False) -> Answer:
        """Asks about what was shown and said so far; ``stream`` prints the answer as it comes.

        If it fails or is interrupted, the conversation stands as before the question.
        """
        if not question.strip():
            raise ValueError("the question is empty: give at least one word")
        parts = [{"type": "image", "image": picture} for picture in self._waiting]
        messages = [*self.messages, {"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        with ExitStack() as undo:
            undo.callback(self._forget_cache)
            answer, output = self._generate(messages, stream)
            undo.pop_all()
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer.text}]}]
        self._waiting = []
        self._cache = cache_of(output)
        self._cached_ids = output.sequences[0, : self._cache.get_seq_length()]
        return answer

    def _generate(self, messages: list[dict], stream: bool):
        tokenizer = tokenizer_of(self.processor)
        inputs = chat_inputs(self.processor, messages, self.model.device)
        n_cached = 0 if self._cache is None else len(self._cached_ids)
        ids = inputs["input_ids"]
        check_length(self.model, ids.shape[1], self.generation["max_new_tokens"])
        goes_on = (
            n_cached > 0
            and not self._waiting
            and ids.shape[1] > n_cached
            and torch.equal(ids[0, :n_cached], self._cached_ids)
        )
        if goes_on:  # the cache holds the pictures already
            of_text = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
            inputs = {name: inputs[name] for name in of_text if name in inputs}
            inputs = {**inputs, **cache_argument(self.model, self._cache)}
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        output, seconds = clocked_generate(
            self.model, inputs, streamer, return_dict_in_generate=True, **self.generation
        )
        new = output.sequences[0, ids.shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True).strip()
        return Answer(text, len(new), seconds, not goes_on), output

    def _forget_cache(self) -> None:
        self._cache = self._cached_ids = None


def speed(answer: Answer) -> str:
    """Tokens of an answer and their rate, for people; an answer of one token has no rate."""
    if math.isnan(answer.seconds_per_token):
        return f"{answer.n_tokens} tokens"
    return f"{answer.n_tokens} tokens at {1 / answer.seconds_per_token:.1f} tokens/s"

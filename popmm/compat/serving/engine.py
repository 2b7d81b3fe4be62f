"""What both ways of making tokens have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import HTTPException
from transformers import GenerationConfig

# parameters of a generation manager's methods
STREAMING = frozenset({"model", "processor", "inputs", "gen_config", "request_id", "response_parser"})


class Failed(RuntimeError):
    """Tokens could not be made, through no fault of the request."""


class Engine:
    """What both ways have in common.

    Args:
        model: attached.
        most_tokens: of a prompt and its answer.
        default_tokens: of an answer, where a request does not say.
        count: is told how many tokens came of how many: ``count(prompt=12)``, ``count(new=1)``.
    """

    def _set(self, model, most_tokens: int, default_tokens: int, count: Callable[..., None]) -> None:
        self.model, self.most_tokens, self.default_tokens, self.count = model, most_tokens, default_tokens, count

    def fit(self, n_prompt: int, config: GenerationConfig) -> None:
        """Refuses what is longer than the model or the cache, and fills in how long an answer may be."""
        room = self.most_tokens - n_prompt
        if n_prompt == 0:
            raise HTTPException(400, "the prompt is empty: give at least one token")
        if room < 1:
            raise HTTPException(400, f"the prompt has {n_prompt} tokens: at most {self.most_tokens - 1} can be read")
        if config.max_new_tokens is None:
            config.max_new_tokens = min(room, self.default_tokens)
        if config.max_new_tokens > room:
            raise HTTPException(
                400,
                f"a prompt of {n_prompt} tokens and max_tokens={config.max_new_tokens} are more than the "
                f"{self.most_tokens} that can be held: give max_tokens={room} or less",
            )
        self.count(prompt=n_prompt)


def in_json(text: str) -> str:
    """What transformers puts between quotes as it is."""
    return " ".join(text.replace("\\", "/").replace('"', "'").split())


def error_body(status: int, message: Any) -> dict:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    return {"error": {"message": str(message), "type": kind, "param": None, "code": status}}

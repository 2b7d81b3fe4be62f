"""transformers' model manager, handlers and app, as popmm serves with them."""

from __future__ import annotations

import base64
import binascii
import inspect
import io
import math
from collections.abc import Callable
from typing import Any

import transformers
from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from transformers.cli.serving import server as _server
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import CBWorkerDeadError, GenerationState, Modality

from popmm.compat.generation import other_way
from popmm.compat.serving.batched import Batched
from popmm.compat.serving.engine import Failed, error_body
from popmm.compat.serving.plain import Plain

SERVED = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")  # of the routes of transformers' app
# of the parameters that transformers ignores: those that change no answer, and what says nothing of the others
HARMLESS = {"metadata", "parallel_tool_calls", "service_tier", "store", "stream_options", "user"}
SAYS_NOTHING = {
    "n": 1,
    "best_of": 1,
    "tool_choice": "auto",
    "function_call": "auto",
    "modalities": ["text"],
    "response_format": {"type": "text"},
}
_PARTS = {
    ModelManager._load_model: {"model_id_and_revision"},
    ModelManager._load_processor: {"model_id_and_revision"},
    ModelManager.get_model_modality: {"model", "processor"},
    ModelManager.process_model_name: {"model_id"},
    GenerationState.use_continuous_batching: {"model", "modality"},
    GenerationState.get_manager: {"model_id", "use_cb"},
    ChatCompletionHandler.handle_request: {"body", "request_id"},
    ChatCompletionHandler._build_generation_config: {"body", "model_generation_config", "use_cb"},
    ChatCompletionHandler.get_processor_inputs_from_messages: {"messages", "modality"},
    CompletionHandler.handle_request: {"body", "request_id"},
    CompletionHandler._build_generation_config: {"body", "model_generation_config", "use_cb"},
    _server.build_server: {"model_manager", "chat_handler", "completion_handler", "generation_state"},
    **Batched.PARTS,
    **Plain.PARTS,
}


def check_parts() -> None:
    """Refuses a transformers whose server is put together in another way.

    Raises:
        RuntimeError: with the part that is not as it was.
    """
    for part, needed in _PARTS.items():
        missing = needed - inspect.signature(part).parameters.keys()
        if missing:
            raise RuntimeError(
                f"popmm serve does not know the server of transformers {transformers.__version__}: "
                f"{part.__qualname__} takes no {', '.join(sorted(missing))}; use transformers 5.17 to 5.24"
            )


class Models(ModelManager):
    """One model, loaded by popmm under the name that it was asked for, and attached.

    Args:
        name: by which clients ask for it.
        load: gives ``(model, tokenizer or processor)``.
    """

    def __init__(self, name: str, load: Callable[[], tuple[Any, Any]]) -> None:
        self._loaded = load()
        super().__init__(device=str(self._loaded[0].device.type), force_model=name)

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None):
        return self._loaded[1]

    def _load_model(self, model_id_and_revision: str, *args, **kwargs):
        return self._loaded[0]

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # no revision: it is loaded already

    def list_models(self, cache_dir: str | None = None) -> list[dict]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "local"}]

    get_gen_models = list_models  # its name up to transformers 5.23


def takes_batches(model, processor) -> bool:
    """Whether transformers' server would decode many sequences of this model at once."""
    modality = ModelManager.get_model_modality(model, processor=processor)
    return GenerationState(continuous_batching=True).use_continuous_batching(model, modality)


class State(GenerationState):
    """Has all requests answered by one engine."""

    def __init__(self, engine: Batched | Plain) -> None:
        super().__init__(continuous_batching=engine.batches)
        self.engine = engine

    def use_continuous_batching(self, model, modality) -> bool:
        return self.engine.batches

    def get_manager(self, model_id: str, use_cb: bool = False):
        return self.engine

    def shutdown(self) -> None:
        self.engine.stop()

    def is_cb_alive(self) -> bool:
        return self.engine.is_alive()


class _Refusing:
    """What is not served is refused with the reason, before a token is read."""

    UNREAD: frozenset[str] = frozenset()

    async def handle_request(self, body: dict, request_id: str):
        self._refuse_unserved(body)
        try:
            return await super().handle_request(body, request_id)
        except (ValueError, TypeError, KeyError, AttributeError, OSError, TemplateError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise HTTPException(400, f"this request cannot be read: {what or type(error).__name__}") from error
        except Failed as error:
            raise HTTPException(500, str(error)) from error

    def _refuse_unserved(self, body: dict) -> None:
        if body.get("max_completion_tokens") is not None:  # which transformers 5.17 ignores
            body["max_tokens"] = body.pop("max_completion_tokens")
        for name in sorted((self._unused_fields | self.UNREAD) - HARMLESS):
            if body.get(name) and body[name] != SAYS_NOTHING.get(name):
                raise HTTPException(400, f"{name} is not served: leave it out")
        for name, least, most in (("temperature", 0, 100), ("top_p", 0, 1), ("max_tokens", 1, math.inf)):
            value = body.get(name)
            if value is not None and not (isinstance(value, (int, float)) and least <= value <= most):
                raise HTTPException(400, f"{name}={value!r}: give a number from {least} to {most}")

    def _build_generation_config(self, body: dict, model_generation_config, use_cb: bool = False):
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        if body.get("max_tokens") is None and body.get("generation_config") is None:
            config.max_new_tokens = None  # as many as there is room for
        temperature = body.get("temperature")
        if temperature or (temperature is None and body.get("top_p") is not None):
            config.do_sample = True
        way = other_way(lambda name: None if name == "use_cache" else getattr(config, name, None))
        if way or (config.num_return_sequences or 1) > 1:
            raise HTTPException(400, f"{way or 'num_return_sequences'} is not served: one sequence, greedy or sampled")
        self.generation_state.engine.check(config)
        return config


class Chat(_Refusing, ChatCompletionHandler):
    """Chat, whose pictures come with the request."""

    async def handle_request(self, body: dict, request_id: str):
        messages = body.get("messages")
        if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
            raise HTTPException(400, "messages: give a list of at least one message")
        return await super().handle_request(body, request_id)

    def get_processor_inputs_from_messages(self, messages: list[dict], modality: Modality) -> list[dict]:
        for message in messages:
            content = message.get("content")
            for part in content if isinstance(content, list) else []:
                _check_part(part, modality)
        return super().get_processor_inputs_from_messages(messages, modality)


class Completion(_Refusing, CompletionHandler):
    """Texts to go on with."""

    UNREAD = frozenset({"logit_bias"})  # by transformers' own handler, which takes it


def _check_part(part: Any, modality: Modality) -> None:
    kind = part.get("type") if isinstance(part, dict) else part
    if kind == "image_url":
        if modality == Modality.LLM:
            raise HTTPException(400, "this model reads text alone: a vision-language model takes pictures")
        url = part.get("image_url")
        _check_picture(url.get("url") if isinstance(url, dict) else url)
    elif kind != "text":
        raise HTTPException(400, f"a part of type {kind!r} is not served: give text and image_url")


def _check_picture(url: Any) -> None:
    """Refuses a picture that is damaged, or that the server would have to fetch: from the web, or its own disk."""
    from PIL import Image

    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise HTTPException(400, "image_url: give the picture itself, as data:image/png;base64,...")
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            image.load()
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HTTPException(400, f"image_url: this picture is damaged or too large ({error})") from None


def build_app(models: Models, engine: Batched | Plain):
    """transformers' app, with the routes that popmm serves and errors in OpenAI's form."""
    state = State(engine)
    handlers = {
        name: kind(models, state) for name, kind in (("chat_handler", Chat), ("completion_handler", Completion))
    }
    others = [name for name in inspect.signature(_server.build_server).parameters if name.endswith("_handler")]
    app = _server.build_server(models, generation_state=state, **{**dict.fromkeys(others), **handlers})
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in SERVED]

    @app.exception_handler(HTTPException)
    async def refused(_request, error: HTTPException):
        return JSONResponse(error_body(error.status_code, error.detail), error.status_code, headers=error.headers)

    @app.exception_handler(CBWorkerDeadError)
    async def dead(_request, error: CBWorkerDeadError):
        return JSONResponse(error_body(503, error), 503)

    @app.exception_handler(RequestValidationError)
    async def unreadable(_request, error: RequestValidationError):
        return JSONResponse(error_body(400, f"the body is no JSON object ({error.errors()[0]['msg']})"), 400)

    return app

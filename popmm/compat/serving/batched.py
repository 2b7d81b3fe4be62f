"""Tokens by continuous batching: of many sequences in each pass."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import ClassVar

from fastapi import HTTPException
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cli.serving.utils import CBGenerateManager, CBStreamer, CBWorkerDeadError, _StreamError
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import RequestStatus

from popmm.compat.serving.engine import STREAMING, Engine, Failed, in_json
from popmm.compat.serving.sampling import SAMPLED, sample_by_request, sampling

PAGE = 256  # tokens
_NAMES = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
_PAGE_NAME = "page_size" if "page_size" in _NAMES else "block_size"  # up to transformers 5.17
CPU_PASS = 512  # tokens in one pass: a long prompt holds up the others that long
PROBE_SECONDS = 600


class Batched(Engine, CBGenerateManager):
    """Many sequences in each pass.

    Args:
        cache_tokens: of all sequences together; None = by the accelerator's memory.
        most_running: sequences in one pass.
        share_prefixes: whether prompts that begin alike are read once.
    """

    batches = True
    PARTS: ClassVar = {
        CBGenerateManager.init_cb: {"model", "gen_config"},
        CBGenerateManager.generate_streaming: STREAMING,
        CBGenerateManager.generate_non_streaming: STREAMING - {"response_parser"},
        CBStreamer.__init__: {"cb_manager", "request_id", "tokenizer", "loop", "queue", "response_parser"},
        ContinuousBatchingManager.add_request: {
            "input_ids",
            "request_id",
            "max_new_tokens",
            "streaming",
            "eos_token_id",
        },
        ContinuousBatchingManager.stop: {"block", "timeout", "hard_stop"},
        ContinuousBatchingManager.register_result_handler: {"request_id", "callback"},
    }

    def __init__(
        self,
        model,
        count: Callable[..., None],
        *,
        most_tokens: int,
        default_tokens: int,
        cache_tokens: int | None,
        most_running: int,
        share_prefixes: bool,
    ) -> None:
        self._set(model, most_tokens, default_tokens, count)
        blocks = None if cache_tokens is None else -(-cache_tokens // PAGE)
        on_cpu = model.device.type == "cpu"
        super().__init__(
            ContinuousBatchingConfig(
                **{_PAGE_NAME: PAGE},
                num_blocks=blocks,
                max_batch_tokens=CPU_PASS if on_cpu else None,
                max_requests_per_batch=most_running,
                allow_block_sharing=share_prefixes,
            )
        )
        self._own = self._unserved(model.generation_config)
        self.left_out = sorted(self._own)  # of what the model's own generation config asks for
        config = GenerationConfig(
            do_sample=False, eos_token_id=model.generation_config.eos_token_id, pad_token_id=0, use_cache=False
        )
        self._cb = model.init_continuous_batching(generation_config=config, continuous_batching_config=self._cb_config)
        sample_by_request(self._cb.logit_processor)
        self._cb.start()

    def init_cb(self, model, gen_config) -> None:
        """Started already, and not by a request's settings."""

    def probe(self) -> None:
        """Reads two tokens, and raises if that cannot be done."""
        ids = [1, 2]
        self._cb.add_request(ids, request_id="probe", max_new_tokens=2, eos_token_id=-1, **sampling(GenerationConfig()))
        for _ in range(PROBE_SECONDS):
            output = self._cb.get_result("probe", timeout=1)
            fatal = self._cb.background_thread_status.fatal_error
            if fatal is not None or (output is not None and output.error is not None):
                raise Failed(str(fatal or output.error))
            if output is not None and output.is_finished():
                return
        raise Failed(f"two tokens took more than {PROBE_SECONDS} seconds")

    @property
    def running(self) -> int:
        processor = self._cb.batch_processor
        return 0 if processor is None else len(processor.scheduler.active_requests)

    def _unserved(self, config: GenerationConfig) -> set[str]:
        """What a configuration asks for that is not set for each request by itself."""
        return {type(p).__name__ for p in self.model._get_logits_processor(config, 1)} - SAMPLED

    def check(self, config: GenerationConfig) -> None:
        """Refuses what only some sequences of a pass would ask for."""
        own, found = self.model.generation_config, sorted(self._unserved(config) - self._own)
        for name in (
            "repetition_penalty",
            "sequence_bias",
        ):  # otherwise than the model does
            if self._own and getattr(config, name) != getattr(own, name):
                found.append(name)
        if found:
            raise HTTPException(
                400,
                f"{', '.join(found)}: not served together with other sequences; leave it out, or start popmm serve "
                "with --no-continuous-batching",
            )

    def _submit(self, processor, inputs: dict, config: GenerationConfig, request_id: str, take: Callable) -> None:
        """Puts a request among the others; ``take`` is called in the event loop with each new token's output."""
        self._check_alive(request_id)
        self._drop_strays()
        ids = list(inputs["input_ids"])
        self.fit(len(ids), config)
        seen, over, stops = 0, False, Stops(processor, config.stop_strings)

        def counting(output) -> None:
            nonlocal seen, over
            if over:
                return
            self.count(new=len(output.generated_tokens) - seen)
            seen = len(output.generated_tokens)
            if stops.end(output.generated_tokens) and not output.is_finished():
                over, output.status = True, RequestStatus.FINISHED
                self._forget(request_id)
            take(output)

        self._cb.register_result_handler(request_id, counting)  # first: an answer may be quick
        accepted = self._cb.add_request(
            ids,
            request_id=request_id,
            max_new_tokens=config.max_new_tokens,
            streaming=True,
            eos_token_id=config.eos_token_id,
            **sampling(config),
        )
        if accepted is None:
            self._forget(request_id)
            raise CBWorkerDeadError("the server is shutting down")

    def _forget(self, request_id: str) -> None:
        """Frees a request's slot and cache; transformers keeps the handler of a request that was cancelled."""
        self._cb.cancel_request(request_id)
        router = self._cb.output_router
        with router._lock:
            router.result_handlers.pop(request_id, None)

    def _drop_strays(self) -> None:
        """Outputs that came after their request was forgotten."""
        strays = self._cb.output_router.output_queue
        while not strays.empty():
            strays.get_nowait()

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        queue: asyncio.Queue = asyncio.Queue()
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        loop = asyncio.get_running_loop()
        streamer = CBStreamer(self._cb, request_id, tokenizer, loop, queue, response_parser=response_parser)
        streamer.cancel = lambda: self._forget(request_id)

        def take(output) -> None:
            try:
                streamer.put(output)
                if output.error is not None:
                    queue.put_nowait(_StreamError(in_json(output.error)))
                elif output.is_finished():
                    streamer.end()
            except Exception as error:
                queue.put_nowait(_StreamError(in_json(str(error))))

        self._submit(processor, inputs, gen_config, request_id, take)
        return queue, streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        done = asyncio.get_running_loop().create_future()

        def take(output) -> None:
            if not done.done() and (output.error is not None or output.is_finished()):
                done.set_result(output)

        self._submit(processor, inputs, gen_config, request_id, take)
        try:
            output = await done
        except asyncio.CancelledError:
            self._forget(request_id)
            raise
        if output.error is not None:
            self._check_alive(request_id)
            raise Failed(output.error)
        text = processor.decode(output.generated_tokens, skip_special_tokens=True)
        return text, len(inputs["input_ids"]), output.generated_tokens

    def stop(self, timeout: float = 10) -> None:
        """Ends what still runs, with an error to each request."""
        if self._cb is not None and self._cb.is_running():
            self._cb.stop(block=True, timeout=timeout, hard_stop=True)


class Stops:
    """Texts that end an answer, and are its last words, as ``generate`` has it.

    Args:
        processor: a tokenizer, or a processor that has one.
        stops: a text, several, or None.
    """

    def __init__(self, processor, stops: str | list[str] | None) -> None:
        self._stops = [stops] if isinstance(stops, str) else [stop for stop in stops or [] if stop]
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._tokens = max((len(stop.encode()) for stop in self._stops), default=0) + 1  # a token is a byte or more

    def end(self, ids: list[int]) -> bool:
        """Whether the last of these tokens has completed one."""
        if not self._stops:
            return False
        tail = self._tokenizer.decode(ids[-self._tokens :], skip_special_tokens=True)
        return any(stop in tail for stop in self._stops)

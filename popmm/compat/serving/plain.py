"""Tokens by ``generate``, for one request after the other."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor
from transformers import GenerationConfig
from transformers.cli.serving.utils import (
    DirectStreamer,
    GenerateManager,
    InferenceThread,
    _GenerationCancelled,
    _StreamError,
)

from popmm.compat.serving.engine import STREAMING, Engine, Failed, in_json


class Plain(Engine, GenerateManager):
    """``generate``, one request after the other in the order in which they came."""

    batches = False
    left_out = ()
    PARTS: ClassVar = {
        GenerateManager.generate_streaming: STREAMING,
        GenerateManager.generate_non_streaming: STREAMING - {"response_parser"},
        DirectStreamer.__init__: {"tokenizer", "loop", "queue", "response_parser"},
        InferenceThread.submit: {"fn"},
    }

    def __init__(self, model, count: Callable[..., None], *, most_tokens: int, default_tokens: int) -> None:
        self._set(model, most_tokens, default_tokens, count)
        super().__init__()
        self.running = 0
        self._streamers: set = set()

    def check(self, config: GenerationConfig) -> None:
        """All that ``generate`` takes is served."""

    def is_alive(self) -> bool:
        return self._thread._thread.is_alive()

    def _submit(self, processor, inputs: dict, config: GenerationConfig, streamer, settle: Callable) -> None:
        """Has ``generate`` run in its turn, unless the client has gone; ``settle(output, error)`` in the event loop."""
        self.fit(inputs["input_ids"].shape[-1], config)
        loop = asyncio.get_running_loop()
        self._streamers.add(streamer)

        def work() -> None:
            output, error = None, None
            self.running = 1
            try:
                if not streamer._cancelled.is_set():
                    output = self.model.generate(
                        **inputs, generation_config=config, streamer=streamer, tokenizer=processor
                    )
            except _GenerationCancelled:
                pass
            except Exception as raised:
                error = raised
            finally:
                self.running = 0
                self._streamers.discard(streamer)
            loop.call_soon_threadsafe(settle, output, error)

        self.submit(work)

    def _streamer(self, processor, queue: asyncio.Queue, response_parser=None) -> DirectStreamer:
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        return Counting(self.count, tokenizer, asyncio.get_running_loop(), queue, response_parser=response_parser)

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        queue: asyncio.Queue = asyncio.Queue()
        streamer = self._streamer(processor, queue, response_parser)

        def settle(output, error) -> None:
            if error is not None:
                queue.put_nowait(_StreamError(in_json(str(error))))
            elif output is None:
                queue.put_nowait(None)

        self._submit(processor, inputs, gen_config, streamer, settle)
        return queue, streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        done = asyncio.get_running_loop().create_future()
        streamer = self._streamer(processor, asyncio.Queue())

        def settle(output, error) -> None:
            if not done.done():
                done.set_result((output, error))

        self._submit(processor, inputs, gen_config, streamer, settle)
        try:
            output, error = await done
        except asyncio.CancelledError:
            streamer.cancel()
            raise
        if output is None:
            raise Failed(str(error or "the server is shutting down"))
        n_prompt = inputs["input_ids"].shape[-1]
        ids = output[0, n_prompt:]
        return processor.decode(ids, skip_special_tokens=True), n_prompt, ids

    def stop(self, timeout: float = 10) -> None:
        """Ends what still runs at its next token."""
        for streamer in list(self._streamers):
            streamer.cancel()
        with contextlib.suppress(concurrent.futures.TimeoutError):  # in a long prompt: whoever detaches waits for it
            self.submit(lambda: None).result(timeout=timeout)


class Counting(DirectStreamer):
    """Counts tokens as they come."""

    def __init__(self, count: Callable[..., None], *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._count = count

    def put(self, value: Tensor) -> None:
        before = self.total_tokens
        super().put(value.flatten())
        if self.total_tokens > before:
            self._count(new=self.total_tokens - before)

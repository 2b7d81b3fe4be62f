"""A model, attached, behind transformers' server."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import uvicorn

from popmm.attach import attach, detach
from popmm.compat.serving import Batched, Models, Plain, build_app, check_parts, takes_batches
from popmm.config import PopConfig
from popmm.serving.gate import Gate
from popmm.serving.limits import CPU_CACHE_TOKENS, Limits
from popmm.serving.metrics import Metrics
from popmm.zoo.encoding import context_length

NO_CONTEXT = 1 << 20  # tokens, of models that do not say how many they read


def why_not_together(config: PopConfig) -> str:
    """Why many sequences cannot be decoded at once with these settings; empty if they can."""
    if config.lossless:
        return "lossless decoding drafts for one sequence"
    if not config.predicts:
        return f"selection={config.selection!r} partitions by one prompt"
    try:
        config.replace(statistics="weights")
    except ValueError as error:
        return str(error)
    return ""


class Server:
    """Serves one model until it is stopped; ``run()`` blocks.

    Args:
        name: by which clients ask for the model.
        load: gives ``(model, tokenizer or processor)``.
        config: how to prune. ``statistics="weights"`` is put in where many sequences are decoded at once.
        limits: see ``Limits``.
        together: whether many sequences are decoded at once (continuous batching); None = where model and settings
            allow it.
        share_prefixes: with ``together``, whether what prompts have in common at their beginning is read once. What
            decode steps have written counts too, so that an answer may depend on what was asked before.

    Raises:
        ValueError: ``together`` is True, and model or settings do not allow it.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], tuple[Any, Any]],
        config: PopConfig,
        limits: Limits,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        together: bool | None = None,
        share_prefixes: bool = False,
    ) -> None:
        check_parts()
        self.metrics = Metrics()
        self.models = Models(name, load)
        self.model, self._processor = self.models._loaded
        self.limits, self._shares = limits, share_prefixes
        self.engine, self.state = self._engine(config, together)
        try:
            self._put_together(host, port)
        except BaseException:
            self.close()
            raise

    def _put_together(self, host: str, port: int) -> None:
        limits, app = self.limits, build_app(self.models, self.engine)
        app.add_api_route("/metrics", self._metrics, methods=["GET"], include_in_schema=False)
        running = limits.running if self.engine.batches else 1
        self.gate = Gate(app, limits, running + limits.waiting, self.metrics.took)
        self.metrics.gate, self.metrics.engine, self.metrics.state = self.gate, self.engine, self.state
        self._uvicorn = _Uvicorn(self.gate, limits.grace, host, port)

    def _engine(self, config: PopConfig, together: bool | None):
        """What makes the tokens, and the attached model's state."""
        why_not = "--no-continuous-batching" if together is False else why_not_together(config)
        if not why_not and not takes_batches(self.model, self._processor):
            why_not = f"transformers batches no {type(self.model).__name__} in its server"
        context = context_length(self.model) or NO_CONTEXT
        if not why_not:
            state = attach(self.model, config.replace(statistics="weights"))
            try:
                return self._batched(context), state
            except Exception as error:  # whatever a model lacks
                why_not = f"{type(error).__name__}: {' '.join(str(error).split())}"
                detach(self.model, wait=True)
        if together:
            raise ValueError(f"--continuous-batching: {why_not}")
        if together is None:
            warnings.warn(f"requests are answered one after the other: {why_not}", stacklevel=3)
        waiting = config.replace(waiting_calls=max(config.waiting_calls, 1))
        engine = Plain(self.model, self.metrics.count, most_tokens=context, default_tokens=self.limits.new_tokens)
        return engine, attach(self.model, waiting)

    def _batched(self, context: int) -> Batched:
        cache = self.limits.cache_tokens
        if cache is None and self.model.device.type == "cpu":
            cache = CPU_CACHE_TOKENS
        engine = Batched(
            self.model,
            self.metrics.count,
            most_tokens=min(context, cache or context),
            default_tokens=self.limits.new_tokens,
            cache_tokens=cache,
            most_running=self.limits.running,
            share_prefixes=self._shares,
        )
        try:
            engine.probe()
        except BaseException:
            engine.stop()
            raise
        if engine.left_out:
            warnings.warn(
                f"continuous batching leaves out {', '.join(engine.left_out)} of the model's own generation config; "
                "--no-continuous-batching serves them",
                stacklevel=4,
            )
        return engine

    def _metrics(self):
        from fastapi import Response

        body, kind = self.metrics.text()
        return Response(body, media_type=kind)

    @property
    def port(self) -> int | None:
        """Where it listens; None before."""
        return self._uvicorn.port

    def run(self, started: Callable[[], None] = lambda: None) -> None:
        """Serves until it is told to stop, by a signal or by ``stop``; then ends what runs, and detaches the model.

        Args:
            started: is called once requests are taken.
        """
        self._uvicorn.says = started
        try:
            self._uvicorn.run()
        finally:
            self.close()

    def stop(self) -> None:
        """Has ``run``, in another thread, return: running requests are given their time."""
        self._uvicorn.should_exit = True

    def close(self) -> None:
        """Ends the engine and takes popmm off the model, unless its weights would have to be loaded for that."""
        self.engine.stop()
        if self.state.config.weights == "keep":
            detach(self.model, wait=True)
        self.models.shutdown()


class _Uvicorn(uvicorn.Server):
    """Tells the gate when it is to stop."""

    def __init__(self, gate: Gate, grace: float, host: str, port: int) -> None:
        self._gate, self._grace = gate, grace
        self.says: Callable[[], None] = lambda: None
        # the gate ends requests with an answer; what is left after that is cut off
        cut = int(grace) + 10
        super().__init__(uvicorn.Config(gate, host, port, log_level="warning", timeout_graceful_shutdown=cut))

    @property
    def port(self) -> int | None:
        return self.servers[0].sockets[0].getsockname()[1] if self.started else None

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            self.says()

    async def shutdown(self, sockets=None) -> None:
        self._gate.close(self._grace)
        await super().shutdown(sockets)

"""Figures of a server in Prometheus' text form, by its client library."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily


class Metrics:
    """Counts tokens as they come, and reads the rest where it is kept when somebody asks.

    Attributes:
        gate: of the server, once there is one.
        engine: that makes the tokens.
        state: the attached model's ``PartitionState``.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.gate = self.engine = self.state = None
        self._prompt = Counter("popmm_prompt_tokens", "Tokens of prompts taken", registry=self.registry)
        self._new = Counter("popmm_generated_tokens", "Tokens generated: rate() gives tokens/s", registry=self.registry)
        self._seconds = Histogram(
            "popmm_request_seconds",
            "From a request's arrival to the end of its answer",
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
            registry=self.registry,
        )
        self.registry.register(self)

    def count(self, prompt: int = 0, new: int = 0) -> None:
        self._prompt.inc(prompt)
        self._new.inc(new)

    def took(self, since: float) -> None:
        """One request, that came at ``time.monotonic()``."""
        self._seconds.observe(time.monotonic() - since)

    def text(self) -> tuple[bytes, str]:
        """(body, content type) of ``GET /metrics``."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator:
        """What prometheus_client asks of a collector."""
        if self.gate is None:
            return
        running = min(self.engine.running, self.gate.inside)
        yield GaugeMetricFamily("popmm_sequences_running", "Sequences that are being decoded", running)
        yield GaugeMetricFamily("popmm_sequences_waiting", "Requests that wait", self.gate.inside - running)
        ended = CounterMetricFamily("popmm_requests_refused", "Requests refused or ended, by status", labels=["status"])
        for status, n in list(self.gate.refused.items()):
            ended.add_metric([str(status)], n)
        yield ended
        read, dense = self.state.bytes_per_token()
        per_token = GaugeMetricFamily(
            "popmm_ffn_bytes_per_token", "FFN bytes that one decoded token reads alone", labels=["weights"]
        )
        per_token.add_metric(["read"], read)
        per_token.add_metric(["dense"], dense)
        yield per_token
        skipped = self.state.channels_skipped()
        yield GaugeMetricFamily("popmm_channels_skipped_ratio", "Share of the FFN channels not computed", skipped)
        passes = CounterMetricFamily("popmm_passes", "Passes of the model by kind (state.passes)", labels=["kind"])
        for kind, n in dict(self.state.passes).items():
            passes.add_metric([kind], n)
        yield passes

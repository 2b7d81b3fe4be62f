"""``generate`` with the time of each token."""

from __future__ import annotations

import math
import time

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """A streamer that notes when each token came, and hands it on."""

    def __init__(self, inner: BaseStreamer | None) -> None:
        self.inner, self.times = inner, []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        if self.inner is not None:
            self.inner.end()


def timed_generate(model, inputs: dict[str, Tensor], streamer: BaseStreamer | None = None, **settings):
    """``(new tokens [n], seconds per decoded token)`` of a generation at batch 1; nan if nothing was decoded."""
    output, seconds = clocked_generate(model, inputs, streamer, **settings)
    return output[0, inputs["input_ids"].shape[1] :], seconds


def clocked_generate(model, inputs: dict, streamer: BaseStreamer | None = None, **settings):
    """``(what generate returns, seconds per decoded token)`` at batch 1; nan if nothing was decoded."""
    clock = Clock(streamer)
    output = model.generate(**inputs, streamer=clock, **settings)
    # put is called with the prompt, then with the token that the prompt pass chose, then once per decode step
    steps = clock.times[1:]
    return output, (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else math.nan

"""``generate`` with the time of each token."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """A streamer that notes when each token came, and hands it on."""

    def __init__(self, inner: BaseStreamer | None) -> None:
        self.inner, self.times, self.counts = inner, [], []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(value.numel())
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        if self.inner is not None:
            self.inner.end()


class Stopwatch:
    """Moments on a device, whose distances can be told once it has come past the later one."""

    def __init__(self, device: torch.device) -> None:
        self._module = None if device.type == "cpu" else torch.get_device_module(device)

    def now(self):
        """A moment; waits for nothing."""
        if self._module is None:
            return time.perf_counter()
        event = self._module.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start, end) -> float:
        """Between two moments that have passed."""
        if self._module is None:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def timed_generate(model, inputs: dict[str, Tensor], streamer: BaseStreamer | None = None, **settings):
    """``(new tokens [n], seconds per decoded token)`` of a generation at batch 1; nan if nothing was decoded."""
    output, seconds = clocked_generate(model, inputs, streamer, **settings)
    return output[0, inputs["input_ids"].shape[1] :], seconds


def clocked_generate(model, inputs: dict, streamer: BaseStreamer | None = None, **settings):
    """``(what generate returns, seconds per decoded token)`` at batch 1; nan if nothing was decoded."""
    clock = Clock(streamer)
    output = model.generate(**inputs, streamer=clock, **settings)
    # put is called with the prompt, then with the token that the prompt pass chose, then with those of each step
    steps, decoded = clock.times[1:], sum(clock.counts[2:])
    return output, (steps[-1] - steps[0]) / decoded if decoded else math.nan

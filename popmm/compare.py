"""Dense and pruned generation of one prompt, side by side."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from popmm.attach import pruned
from popmm.config import PopConfig
from popmm.report import human_bytes


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


@dataclass
class Run:
    """One generation, and what it cost."""

    label: str
    tokens: Tensor  # [n], new tokens only
    seconds_per_token: float  # of decode steps, prompt pass excluded
    ffn_bytes: int  # FFN weight bytes per decoded token
    partition_seconds: float = 0.0
    same_prefix: int = 0  # leading tokens equal to the dense run's
    top1_agreement: float = 1.0  # share of steps, along the dense text, that choose the dense token


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


@torch.no_grad()
def decode_along(model, state, tokens: Tensor, cache) -> Tensor:
    """Logits ``[n, vocab]`` of decode steps along ``tokens`` ``[n]``, as if one by one, refreshes included."""
    every = state.config.refresh_every
    logits = []
    for piece in tokens.split(every + 1 if every else len(tokens)):
        with state.simulated_decode():
            logits.append(model(piece[None, : every or None], past_key_values=cache).logits[0])
        if every and len(piece) > every:
            logits.append(model(piece[None, every:], past_key_values=cache).logits[0])
    return torch.cat(logits)


@torch.no_grad()
def top1_agreement(model, state, inputs: dict[str, Tensor], text: Tensor) -> float:
    """Share of decode steps along ``text`` whose likeliest token, pruned, is the text's next one."""
    if len(text) < 2:
        return 1.0
    cache = model(**inputs, use_cache=True).past_key_values
    logits = decode_along(model, state, text[:-1], cache)
    return (logits.argmax(-1) == text[1:]).float().mean().item()


def compare(model, inputs: dict[str, Tensor], configs: dict[str, PopConfig], **settings) -> list[Run]:
    """A dense run, then one per labelled config, all with the same generation settings and seed."""
    seed = settings.pop("seed", 0)
    torch.manual_seed(seed)
    model.generate(**inputs, **{**settings, "max_new_tokens": 2})  # warm up
    torch.manual_seed(seed)
    tokens, seconds = timed_generate(model, inputs, **settings)
    runs = [Run("dense", tokens, seconds, 0)]
    for label, config in configs.items():
        with pruned(model, config) as state:
            torch.manual_seed(seed)
            new, seconds = timed_generate(model, inputs, **settings)
            partition_seconds = state.partition_seconds()
            ffn_bytes, runs[0].ffn_bytes = state.bytes_per_token()
            shared = min(len(new), len(tokens))
            differs = (new[:shared] != tokens[:shared]).nonzero()
            same = int(differs[0]) if len(differs) else shared
            agreement = top1_agreement(model, state, inputs, tokens)
            runs.append(Run(label, new, seconds, ffn_bytes, partition_seconds, same, agreement))
    return runs


def comparison_table(runs: list[Run]) -> Table:
    """What each run cost and how it agrees with the first, the dense one."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for run in runs:
        table.add_column(run.label, justify="right")
    dense = runs[0]
    rows = {
        "tokens/s": lambda r: f"{1 / r.seconds_per_token:.1f}",
        "FFN bytes per token": lambda r: human_bytes(r.ffn_bytes),
        "  of dense": lambda r: f"{r.ffn_bytes / dense.ffn_bytes:.1%}",
        "partition time": lambda r: "-" if r is dense else f"{r.partition_seconds * 1e3:.1f} ms",
        "  in dense decode steps": lambda r: (
            "-" if r is dense else f"{r.partition_seconds / dense.seconds_per_token:.2f}"
        ),
        "same leading tokens": lambda r: f"{r.same_prefix} of {len(dense.tokens)}" if r is not dense else "-",
        "top-1 along the dense text": lambda r: f"{r.top1_agreement:.1%}" if r is not dense else "-",
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(run) for run in runs))
    return table


def texts_table(runs: list[Run], tokenizer) -> Table:
    """The texts of the runs, side by side."""
    table = Table(box=box.SIMPLE_HEAD, show_lines=False)
    for run in runs:
        table.add_column(run.label, ratio=1, overflow="fold")
    table.add_row(*(tokenizer.decode(run.tokens, skip_special_tokens=True).strip() for run in runs))
    return table

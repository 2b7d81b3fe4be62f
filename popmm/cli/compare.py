"""Dense and pruned generation of one prompt, side by side."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from popmm.attach import pruned
from popmm.compat import cache_argument, cache_of
from popmm.config import PopConfig
from popmm.report import human_bytes
from popmm.runtime.clock import timed_generate
from popmm.runtime.passes import Passes


@dataclass
class Run:
    """One generation, and what it cost."""

    label: str
    tokens: Tensor  # [n], new tokens only
    seconds_per_token: float  # of decode steps, prompt pass excluded; nan without any
    ffn_bytes: int  # FFN weight bytes per decoded token
    channels_skipped: float = 0.0  # share of a decoded token's FFN channels that are not computed
    partition_seconds: float = 0.0
    same_prefix: int = 0  # leading tokens equal to the dense run's
    top1_agreement: float = 1.0  # share of steps, along the dense text, that choose the dense token; nan without any
    passes: Passes | None = None  # of lossless decoding


@torch.no_grad()
def decode_along(model, state, tokens: Tensor, cache) -> Tensor:
    """Logits ``[n, vocab]`` of decode steps along ``tokens`` ``[n]``, as if one by one, refreshes included."""
    every, kept = state.config.refresh_every, cache_argument(model, cache)
    logits = []
    for piece in tokens.split(every + 1 if every else len(tokens)):
        with state.simulated_decode():
            logits.append(model(piece[None, : every or None], **kept).logits[0])
        if every and len(piece) > every:
            logits.append(model(piece[None, every:], **kept).logits[0])
    return torch.cat(logits)


@torch.no_grad()
def top1_agreement(model, state, inputs: dict[str, Tensor], text: Tensor) -> float:
    """Share of decode steps along ``text`` whose likeliest token, pruned, is the text's next one; nan without any."""
    if len(text) < 2:
        return math.nan
    cache = cache_of(model(**inputs, use_cache=True))
    logits = decode_along(model, state, text[:-1], cache)
    return (logits.argmax(-1) == text[1:]).float().mean().item()


def check_pruned(state, label: str, new_tokens: int) -> None:
    """Refuses to show a dense run as a pruned one.

    Raises:
        RuntimeError: something is to be pruned, tokens were decoded, and no step of them was pruned.
    """
    decoded = new_tokens - 1  # the prompt pass gives the first
    if state.passes.get("verify", 0):
        return  # lossless, where it may be that drafts do not pay
    if decoded > 0 and not state.is_dense and state.passes["decode"] == 0:
        reasons = "; ".join(getattr(state.passes, "reasons", ())) or "its decode steps were not seen"
        raise RuntimeError(
            f"{label}: none of {decoded} decode steps was pruned ({reasons}): there is nothing to compare"
        )


def compare(model, inputs: dict[str, Tensor], configs: dict[str, PopConfig], **settings) -> list[Run]:
    """A dense run, then one per labelled config, all with the same generation settings and seed.

    Raises:
        RuntimeError: a run that ought to be pruned was not.
    """
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
            check_pruned(state, label, len(new))
            passes, partition_seconds = copy.deepcopy(state.passes), state.partition_seconds()
            ffn_bytes, runs[0].ffn_bytes = state.bytes_per_token()
            shared = min(len(new), len(tokens))
            differs = (new[:shared] != tokens[:shared]).nonzero()
            same = int(differs[0]) if len(differs) else shared
            agreement = top1_agreement(model, state, inputs, tokens)
            skipped = state.channels_skipped()
            runs.append(Run(label, new, seconds, ffn_bytes, skipped, partition_seconds, same, agreement))
            if config.lossless:
                _as_lossless(runs[-1], passes, ffn_bytes, runs[0].ffn_bytes)
    return runs


def _as_lossless(run: Run, passes: Passes, drafting: int, dense: int) -> None:
    """What a token of the text has cost, drafts and checks together; nothing of it is skipped in the end."""
    checks, decoded = passes["verify"], max(1, len(run.tokens) - 1)
    run.passes, run.channels_skipped = passes, 0.0
    run.ffn_bytes = round((passes.drafted * drafting + checks * dense) / decoded)


def drafts_of(passes: Passes, lossless: bool) -> dict:
    """What lossless decoding has drafted, as plain data; nothing without it."""
    if not lossless:
        return {}
    found = {"drafted": passes.drafted, "accepted": passes.accepted}
    return {**found, "acceptance": passes.acceptance, "tokens_per_round": passes.tokens_per_round}


def _or_dash(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "-"


def comparison_table(runs: list[Run]) -> Table:
    """What each run cost and how it agrees with the first, the dense one."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for run in runs:
        table.add_column(run.label, justify="right")
    dense = runs[0]
    of_pruned = {
        "partition time": lambda r: f"{r.partition_seconds * 1e3:.1f} ms",
        "  in dense decode steps": lambda r: _or_dash(r.partition_seconds / dense.seconds_per_token, "{:.2f}"),
        "same leading tokens": lambda r: f"{r.same_prefix} of {len(dense.tokens)}",
        "top-1 along the dense text": lambda r: _or_dash(r.top1_agreement, "{:.1%}"),
    }
    rows = {
        "tokens/s": lambda r: _or_dash(1 / r.seconds_per_token, "{:.1f}"),
        "FFN bytes per token": lambda r: human_bytes(r.ffn_bytes),
        "  of dense": lambda r: f"{r.ffn_bytes / dense.ffn_bytes:.1%}",
        "FFN channels skipped": lambda r: f"{r.channels_skipped:.1%}",
        **{name: lambda r, cell=cell: "-" if r is dense else cell(r) for name, cell in of_pruned.items()},
    }
    drafting = {
        "drafted tokens accepted": lambda r: f"{r.passes.accepted} of {r.passes.drafted}",
        "tokens per round": lambda r: f"{r.passes.tokens_per_round:.2f}",
    }
    if any(run.passes is not None for run in runs):
        rows |= {name: lambda r, cell=cell: "-" if r.passes is None else cell(r) for name, cell in drafting.items()}
    for name, cell in rows.items():
        table.add_row(name, *(cell(run) for run in runs))
    return table


def text_of(run: Run, tokenizer) -> str:
    return tokenizer.decode(run.tokens, skip_special_tokens=True).strip()


def texts_table(runs: list[Run], tokenizer) -> Table:
    """The texts of the runs, side by side."""
    table = Table(box=box.SIMPLE_HEAD, show_lines=False)
    for run in runs:
        table.add_column(run.label, ratio=1, overflow="fold")
    table.add_row(*(text_of(run, tokenizer) for run in runs))
    return table


def rows_of(runs: list[Run], tokenizer) -> list[dict]:
    """The runs as plain data, rates in tokens per second and times in milliseconds; the first is the dense one."""
    dense, rows = runs[0], []
    for run in runs:
        row = {
            "label": run.label,
            "text": text_of(run, tokenizer),
            "tokens": len(run.tokens),
            "tokens_per_second": 1 / run.seconds_per_token,
            "ffn_bytes_per_token": run.ffn_bytes,
            "of_dense_bytes": run.ffn_bytes / dense.ffn_bytes,
            "channels_skipped": run.channels_skipped,
        }
        if run is not dense:
            row["partition_ms"] = run.partition_seconds * 1e3
            row["same_leading_tokens"], row["top1_agreement"] = run.same_prefix, run.top1_agreement
        if run.passes is not None:
            row |= drafts_of(run.passes, True)
        rows.append(row)
    return rows

"""Quality of pruned decoding: a prompt is read, what follows it is decoded teacher-forced.

Likelihood scored in one pass would never decode, and so measure the dense model. Here the continuation
goes through ``PartitionState.simulated_decode``: one pass, with a mask per token, equal to decoding token
by token. Every method is compared with the dense model's own distribution at the same positions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from popmm.attach import attach_with, detach
from popmm.compat import cache_argument, cache_of
from popmm.config import PopConfig
from popmm.evaluation.baselines import Threshold
from popmm.evaluation.methods import METHODS, Method, check_known, fit, quantised_ffns, share_read
from popmm.evaluation.progress import progress
from popmm.layouts.traffic import channels_computed

MEASURES = ("perplexity", "kl", "top1", "prefix", "exact")


@dataclass(frozen=True)
class Case:
    """A prompt and what is decoded after it."""

    inputs: dict[str, Tensor]  # of the prompt, batch 1; of a batch (``together``) all tensors have it before
    tokens: Tensor  # [n], the given continuation
    greedy: Tensor | None = None  # [m], the dense model's own


@dataclass
class Row:
    """Quality of one method at one ratio: mean over subsets of their means, and the spread over subsets."""

    method: str
    ffn_ratio: float  # the method's own setting
    bytes_share: float  # FFN weight bytes per token, of dense
    perplexity: float
    perplexity_spread: float
    kl: float  # KL(dense || pruned) per token, nats
    kl_spread: float
    top1: float  # share of positions with the dense model's likeliest token
    top1_spread: float
    prefix: float | None  # leading tokens of the dense model's greedy text that are the likeliest here too
    prefix_spread: float | None
    exact: float  # share of continuations that greedy decoding gives word for word
    exact_spread: float
    texts: int
    subsets: int
    pruning_ratio: float | None = None  # what was asked for: one of these two
    bytes_wanted: float | None = None
    channels_skipped: float | None = None  # share of a token's FFN channels that are not computed
    batch: int = 1  # sequences that are decoded together; of them a step reads so many bytes


@dataclass(frozen=True)
class Wanted:
    """What to measure: a method, and how much it may prune or read."""

    method: str
    pruning_ratio: float | None = None
    ffn_ratio: float | None = None
    bytes_share: float | None = None
    batch: int = 1  # sequences that are decoded together


@torch.no_grad()
def decode_logits(model, inputs: dict[str, Tensor], tokens: Tensor, around) -> Tensor:
    """Logits ``[(batch,) n, vocab]``, float32, that predict each of ``tokens`` ``[(batch,) n]``.

    The first comes of the prompt pass.

    Args:
        around: context manager factory around the continuation's pass.
    """
    prompt = model(**inputs, use_cache=True)
    ids = tokens.view(-1, tokens.shape[-1])
    logits = prompt.logits[:, -1:].float()
    if ids.shape[1] > 1:
        with around():
            rest = model(ids[:, :-1], **cache_argument(model, cache_of(prompt))).logits.float()
        logits = torch.cat([logits, rest], dim=1)
    return logits.view(*tokens.shape, -1)


def together(cases: list[Case], batch: int) -> list[Case]:
    """Cases in batches, without greedy texts; those left over, fewer than a batch, are left out.

    Raises:
        ValueError: their prompts differ in more than their tokens, or are too few.
    """
    if batch == 1:
        return cases
    alike = {(tuple((name, t.shape) for name, t in case.inputs.items()), case.tokens.shape) for case in cases}
    if len(alike) > 1 or len(cases) < batch:
        raise ValueError(
            f"batches of {batch} need as many texts in each subset, of one length, and there are {len(cases)} texts of "
            f"{len(alike)} kinds: give texts that are long enough, more of them, or smaller batches"
        )
    groups = [cases[i : i + batch] for i in range(0, len(cases) - batch + 1, batch)]
    return [
        Case(
            {name: torch.cat([case.inputs[name] for case in group]) for name in group[0].inputs},
            torch.stack([case.tokens for case in group]),
        )
        for group in groups
    ]


def tracked(items: list, what: str) -> Iterator:
    """The items, with a bar of how far the work on them has come."""
    with progress() as bars:
        yield from bars.track(items, description=what)


@torch.no_grad()
def with_greedy(model, cases: list[Case], n_tokens: int) -> list[Case]:
    """The cases, with the dense model's greedy continuation of each."""
    how = dict(do_sample=False, max_new_tokens=n_tokens, num_beams=1)
    found = []
    for case in tracked(cases, "the dense model's own texts"):
        inputs = {"attention_mask": torch.ones_like(case.inputs["input_ids"]), **case.inputs}
        new = model.generate(**inputs, **how)[0, case.inputs["input_ids"].shape[1] :]
        found.append(replace(case, greedy=new))
    return found


def evaluate(
    model, subsets: list[list[Case]], wanted: list[Wanted], base: PopConfig, calibration: list[Case] | None = None
) -> list[Row]:
    """Rows for all that is wanted, the dense model first, without shares of bytes that a method cannot keep to.

    Args:
        subsets: disjoint subsets of cases.
        base: settings that the methods change.
        calibration: cases for methods that calibrate beforehand.
    """
    check_known([w.method for w in wanted])
    if not calibration and any(METHODS[w.method].calibrated for w in wanted):
        names = sorted({w.method for w in wanted if METHODS[w.method].calibrated})
        raise ValueError(f"{', '.join(names)}: these methods calibrate beforehand; give calibration texts")
    in_batches = {n: [together(cases, n) for cases in subsets] for n in {1, *(w.batch for w in wanted)}}
    with progress() as bars:
        bar = bars.add_task("evaluating", total=(2 + len(wanted)) * sum(map(len, subsets)))
        dense: list[list[Tensor]] = []
        for cases in subsets:
            dense.append([])
            for case in cases:
                dense[-1].append(decode_logits(model, case.inputs, case.tokens, nullcontext))
                bars.advance(bar)

        def measured(around, batch: int = 1) -> list[dict[str, float]]:
            scores = []
            for cases, reference in zip(in_batches[batch], dense):
                found = []
                for i, case in enumerate(cases):
                    own = reference[i] if batch == 1 else torch.stack(reference[i * batch : (i + 1) * batch])
                    found.append(_measure(model, case, own, around))
                    bars.advance(bar, batch)
                scores.append(_subset(found))
            return scores

        rows = [_row("dense", 0.0, 1.0, 0.0, measured(nullcontext), subsets)]
        for w in wanted:
            method = METHODS[w.method]
            if method.weight_bits is not None:
                with quantised_ffns(model, method.weight_bits) as share:
                    rows.append(_row(w.method, 0.0, share, 0.0, measured(nullcontext), subsets))
                continue
            ratio = _ratio(model, method, base, w)
            if not any(value is not None for value in ratio.values()):
                bars.advance(bar, sum(map(len, subsets)))
                continue
            with _attached(model, method, base.replace(**ratio), calibration) as state:
                scores = measured(state.simulated_decode, w.batch)
                ratio = 0.0 if method.fixed else state.ffn_ratio
                share, skipped = share_read(state, w.batch), share_skipped(state, w.batch)
                row = _row(w.method, ratio, share, skipped, scores, in_batches[w.batch])
            row.pruning_ratio, row.bytes_wanted, row.batch = w.pruning_ratio, w.bytes_share, w.batch
            rows.append(row)
    return rows


def _ratio(model, method: Method, base: PopConfig, w: Wanted) -> dict[str, float | None]:
    if method.fixed:
        return {"ffn_ratio": 0.5}  # whatever
    if w.bytes_share is not None:
        return {"ffn_ratio": fit(model, method, base, w.bytes_share)}
    return {"ffn_ratio": w.ffn_ratio} if w.ffn_ratio is not None else {"pruning_ratio": w.pruning_ratio}


@contextmanager
def _attached(model, method: Method, asked: PopConfig, calibration: list[Case] | None) -> Iterator:
    state = attach_with(model, method.config(asked), method.sizes)
    try:
        if method.prepare is not None:

            def read() -> None:
                for case in calibration:
                    decode_logits(model, case.inputs, case.tokens, state.simulated_decode)

            method.prepare(state, read)
        yield state
    finally:
        detach(model)


def _measure(model, case: Case, dense: Tensor, around) -> dict:
    """Of one case, at the positions that are decoded; ``exact`` and ``prefix`` count the prompt's own token too."""
    logits = decode_logits(model, case.inputs, case.tokens, around)
    own, reference = logits.log_softmax(-1), dense.log_softmax(-1)
    likeliest = own.argmax(-1)
    decoded, targets = own[..., 1:, :].flatten(0, -2), case.tokens[..., 1:].flatten()
    whole = reference[..., 1:, :].flatten(0, -2)
    found = {
        "entropy": F.nll_loss(decoded, targets, reduction="none"),
        "kl": F.kl_div(decoded, whole, log_target=True, reduction="none").sum(-1),
        "top1": (decoded.argmax(-1) == whole.argmax(-1)).float(),
        "exact": (likeliest == case.tokens).all(-1).float().view(-1),
    }
    if case.greedy is not None:
        same = decode_logits(model, case.inputs, case.greedy, around).argmax(-1) == case.greedy
        found["prefix"] = same.long().cumprod(0).sum().float().view(1)
    return found


def _subset(found: list[dict]) -> dict[str, float]:
    mean = {name: torch.cat([f[name] for f in found]).double().mean().item() for name in found[0]}
    mean["perplexity"] = math.exp(min(mean.pop("entropy"), 700.0))
    return mean


def share_skipped(state, batch: int = 1) -> float:
    """Share of a token's FFN channels that were not computed; of thresholds, by what passed."""
    skipped = state.channels_skipped(batch)
    total = sum(ffn.site.active_channels() for ffn in state._ffns)
    total += sum(site.active_channels() for site in state._left_dense)
    for ffn in state._ffns:
        if isinstance(ffn.choose, Threshold) and ffn.choose.tokens:
            by_rule = channels_computed(ffn.site, ffn.sizes, ffn.config)
            passing = channels_computed(ffn.site, ffn.sizes, ffn.config, ffn.choose.passed / ffn.choose.tokens)
            skipped += (by_rule - passing) / total
    return skipped


def _row(
    method: str,
    ratio: float,
    share: float,
    skipped: float,
    scores: list[dict[str, float]],
    subsets: list[list[Case]],
) -> Row:
    values = {}
    for name in MEASURES:
        of_subsets = [score[name] for score in scores if name in score]
        values[name] = statistics.mean(of_subsets) if of_subsets else None
        values[f"{name}_spread"] = statistics.stdev(of_subsets) if len(of_subsets) > 1 else 0.0
    values["kl"] = max(values["kl"], 0.0)  # rounding
    n_texts = sum(case.tokens.shape[:-1].numel() for own in subsets for case in own)
    of_all = dict(texts=n_texts, subsets=len(subsets), channels_skipped=skipped)
    return Row(method, ratio, share, **values, **of_all)

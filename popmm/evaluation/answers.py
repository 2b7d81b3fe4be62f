"""Exact answers about pictures: how many does a pruned vision-language model get right, kind by kind.

An answer is exact if greedy decoding gives it word for word. Decoding along the right answer shows that
in one pass: each of its tokens, and the end, must be the likeliest after those before it.
"""

from __future__ import annotations

import itertools
import random
import statistics
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from popmm.attach import pruned
from popmm.config import PopConfig
from popmm.evaluation.baselines import rank_by_modality
from popmm.evaluation.evaluate import decode_logits
from popmm.evaluation.progress import progress
from popmm.method.modality import TEXT
from popmm.zoo import shapes
from popmm.zoo.encoding import chat_inputs, tokenizer_of

if TYPE_CHECKING:
    from popmm.state import PartitionState

# name: (only this modality's statistics, or all; settings)
METHODS: dict[str, tuple[str | None, dict]] = {
    "text tokens alone": (TEXT, {}),
    "image tokens alone": ("image", {}),
    "joint": (None, {}),
    "joint, balanced": (None, {"modality_balance": 0.5}),
}
FIRST_SEED = 100  # held out: training starts at a million
SEED_STRIDE = 100_000


@dataclass
class AnswerRow:
    """Share of exact answers of one method at one ratio, by kind of question: (mean, spread over seeds)."""

    method: str
    pruning_ratio: float
    bytes_share: float
    accuracy: dict[str, tuple[float, float]]  # "all" last
    channels_skipped: float | None = None  # share of a token's FFN channels that are not computed


@dataclass
class Asked:
    """A question as the model gets it, and its right answer."""

    kind: str
    inputs: dict
    answer: torch.Tensor  # [n], ends with the end-of-turn token


def held_out_questions(processor, device, seed: int, pictures: int) -> list[Asked]:
    """One question of each kind about each of ``pictures`` held-out pictures of more shapes than most."""
    tokenizer = tokenizer_of(processor)
    asked = []
    for i in range(pictures):
        generator = random.Random(FIRST_SEED + seed * SEED_STRIDE + i)
        scene = shapes.random_scene(generator, least=4, most=7)
        picture = shapes.draw(scene)
        for question in shapes.questions(scene, generator):
            parts = [{"type": "image", "image": picture}, {"type": "text", "text": question.text}]
            inputs = chat_inputs(processor, [{"role": "user", "content": parts}], device)
            answer = tokenizer(question.answer + tokenizer.eos_token, return_tensors="pt")["input_ids"][0]
            asked.append(Asked(question.kind, inputs, answer.to(device)))
    return asked


def is_exact(model, asked: Asked, state: PartitionState | None) -> bool:
    """Whether greedy decoding gives the answer."""
    around = nullcontext if state is None else state.simulated_decode
    likeliest = decode_logits(model, asked.inputs, asked.answer, around).argmax(-1)
    return bool((likeliest == asked.answer).all())


def evaluate_answers(
    model, processor, methods: list[str], ratios: list[float], base: PopConfig, pictures: int, seeds: int
) -> list[AnswerRow]:
    """Rows for every method and ratio, the dense model first.

    Args:
        methods: keys of ``METHODS``.
        base: settings that the methods change.
        pictures: held-out pictures per seed, one question of each kind about each.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}: give some of {', '.join(map(repr, METHODS))}")
    sets = [held_out_questions(processor, model.device, seed, pictures) for seed in range(seeds)]
    with progress() as bars:
        bar = bars.add_task("answering", total=(1 + len(methods) * len(ratios)) * sum(map(len, sets)))

        def exact(state: PartitionState | None) -> list[dict[str, float]]:
            shares = []
            for asked in sets:
                found: dict[str, list[bool]] = {}
                for question in asked:
                    found.setdefault(question.kind, []).append(is_exact(model, question, state))
                    bars.advance(bar)
                by_kind = {kind: statistics.mean(found[kind]) for kind in shapes.KINDS if kind in found}
                shares.append({**by_kind, "all": statistics.mean(itertools.chain(*found.values()))})
            return shares

        rows = [_row("dense", 0.0, 1.0, 0.0, exact(None))]
        for ratio in ratios:
            for name in methods:
                modality, settings = METHODS[name]
                with pruned(model, base.replace(pruning_ratio=ratio, **settings)) as state:
                    if modality is not None:
                        rank_by_modality(state, modality)
                    read, everything = state.bytes_per_token()
                    rows.append(_row(name, ratio, read / everything, state.channels_skipped(), exact(state)))
    return rows


def _row(method: str, ratio: float, share: float, skipped: float, seeds: list[dict[str, float]]) -> AnswerRow:
    spread = statistics.stdev if len(seeds) > 1 else lambda _: 0.0
    values = {kind: [seed[kind] for seed in seeds] for kind in seeds[0]}
    accuracy = {kind: (statistics.mean(v), spread(v)) for kind, v in values.items()}
    return AnswerRow(method, ratio, share, accuracy, skipped)


def answers_to_markdown(rows: list[AnswerRow]) -> str:
    """Rows as a Markdown table."""
    kinds = list(rows[0].accuracy)
    lines = [f"| statistics | pruned | FFN bytes | skipped | {' | '.join(kinds)} |", "|" + "---|" * (4 + len(kinds))]
    for r in rows:
        cells = [f"{100 * mean:.1f} ± {100 * spread:.1f}" for mean, spread in r.accuracy.values()]
        skipped = "-" if r.channels_skipped is None else f"{r.channels_skipped:.1%}"
        lines.append(f"| {r.method} | {r.pruning_ratio:.0%} | {r.bytes_share:.1%} | {skipped} | {' | '.join(cells)} |")
    return "\n".join(lines)

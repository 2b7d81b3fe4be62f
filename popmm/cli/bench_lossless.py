"""``popmm bench --lossless``: drafting against dense decoding of the same texts, row by row in turn."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from popmm.attach import pruned
from popmm.cli.bench import random_ids
from popmm.cli.bench_rows import machine
from popmm.compat import compiled_anywhere
from popmm.config import PopConfig
from popmm.evaluation.progress import progress
from popmm.evaluation.texts import own_samples, read_questions, read_texts, windows
from popmm.runtime.clock import timed_generate
from popmm.runtime.passes import Passes
from popmm.zoo.encoding import encode

LOOKUP = 10  # tokens that transformers' prompt lookup proposes


@dataclass
class LosslessRow:
    """How one way of decoding went on with the texts."""

    row: str
    tokens_per_second: float = 0.0  # median over the texts
    speed_up: float = 0.0  # against the fastest dense row
    same_texts: int = 0  # as the first row's
    rates: list[float] = field(default_factory=list)
    passes: Passes = field(default_factory=Passes)

    def as_data(self) -> dict:
        """For JSON."""
        places = [stood / tried for tried, stood in self.passes.by_place if tried]
        return {
            "row": self.row,
            "tokens_per_second": self.tokens_per_second,
            "speed_up": self.speed_up,
            "same_texts": self.same_texts,
            "texts": len(self.rates),
            "tokens_per_round": self.passes.tokens_per_round,
            "acceptance": self.passes.acceptance,
            "accepted_by_place": places,
            "rates": self.rates,
        }


def random_prompts(model, n: int, n_tokens: int) -> list[dict[str, Tensor]]:
    """For weights that are random too."""
    ids = random_ids(model, (n, 1, n_tokens), seed=0)
    return [{"input_ids": own, "attention_mask": torch.ones_like(own)} for own in ids]


def prompts(model, tokenizer, file: Path | None, n: int, n_tokens: int) -> list[dict[str, Tensor]]:
    """What is gone on with: windows of a text, questions of a file of JSON lines, or the model's own samples."""
    if file is None:
        ids = [sample[:n_tokens] for sample in own_samples(model, tokenizer, n, n_tokens + 1)]
    elif file.suffix == ".jsonl":
        return [encode(tokenizer, question, model.device, chat=None) for question, _ in read_questions(file, n)]
    else:
        texts = read_texts(file)
        each = 1 if len(texts) > 1 else n
        found = (windows(tokenizer, text, n_tokens, each, model.device) for text in texts)
        ids = [window for own in found for window in own if len(window) == n_tokens][:n]
    if not ids:
        raise ValueError(f"{file} holds no text of {n_tokens} tokens: give --prompt-tokens less")
    return [{"input_ids": own[None], "attention_mask": torch.ones_like(own[None])} for own in ids]


class LosslessBench:
    """Rows over the same texts, each text by all of them in turn. Holds two copies of the model."""

    def __init__(
        self, model, config: PopConfig, new: int, compiled: bool, assistant=None, replay: float | None = None
    ) -> None:
        self.plain, self.config, self.new, self.compiled, self.assistant = model, config, new, compiled, assistant
        self.replay = replay  # of random weights: the rate at which a drafted token is taken to stand

    def run(self, texts: list[dict[str, Tensor]]) -> list[LosslessRow]:
        rows: dict[str, LosslessRow] = {}
        with ExitStack() as stack, progress() as bars:
            drafting = copy.deepcopy(self.plain)
            state = stack.enter_context(pruned(drafting, self.config))
            if self.replay is not None:
                state.replay_acceptance(self.replay)
            ways = dict(self._ways(drafting))
            bar = bars.add_task("decoding", total=len(ways) * (len(texts) + self._warm_ups))
            for label, way in ways.items():
                for text in texts[:1] * self._warm_ups:
                    way(text)
                    bars.advance(bar)
                rows[label] = LosslessRow(label)
            for text in texts:
                expected = None
                for label, way in ways.items():
                    counted = copy.deepcopy(state.passes)
                    tokens, seconds = way(text)
                    expected = tokens if expected is None else expected
                    rows[label].rates.append(1 / seconds)
                    rows[label].same_texts += torch.equal(tokens, expected)
                    rows[label].passes.add(state.passes.since(counted))
                    bars.advance(bar)
        found = list(rows.values())
        for row in found:
            row.tokens_per_second = statistics.median(row.rates)
        fastest = max(row.tokens_per_second for row in found if row.row.startswith("dense"))
        for row in found:
            row.speed_up = row.tokens_per_second / fastest
        return found

    @property
    def _warm_ups(self) -> int:
        return 3 if self.compiled else 1

    def _ways(self, drafting) -> Iterator[tuple[str, Callable]]:
        static = dict(cache_implementation="static")
        yield "dense eager", self._way(self.plain)
        if self.compiled:
            yield "dense compiled", self._way(self.plain, **static, compile_config=compiled_anywhere(fullgraph=True))
        yield "lossless eager", self._way(drafting)
        if self.compiled:
            yield "lossless compiled", self._way(drafting, **static)
        if self.replay is not None:
            return
        yield "prompt lookup (transformers)", self._way(self.plain, prompt_lookup_num_tokens=LOOKUP)
        if self.assistant is not None:
            yield "assistant (transformers)", self._way(self.plain, assistant_model=self.assistant)

    def _way(self, model, **how) -> Callable:
        length = dict(max_new_tokens=self.new, min_new_tokens=self.new, do_sample=False)
        return lambda inputs: timed_generate(model, inputs, **length, **how)


COLUMNS = ("tokens/s", "speed-up", "same texts", "tokens/round", "accepted", "by place")


def _cells(row: dict) -> list[str]:
    return [
        f"{row['tokens_per_second']:.1f}",
        f"{row['speed_up']:.2f}",
        f"{row['same_texts']} of {row['texts']}",
        "-" if row["tokens_per_round"] is None else f"{row['tokens_per_round']:.2f}",
        "-" if row["acceptance"] is None else f"{row['acceptance']:.3f}",
        " ".join(f"{share:.2f}" for share in row["accepted_by_place"]) or "-",
    ]


def lossless_table(rows: list[LosslessRow], title: str) -> Table:
    """Rows for people."""
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.row, *_cells(row.as_data()))
    return table


def lossless_markdown(rows: list[dict]) -> str:
    """Rows of a JSON file as a Markdown table."""
    lines = ["| row | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    return "\n".join(lines + [f"| {row['row']} | {' | '.join(_cells(row))} |" for row in rows])


def save_lossless(file: Path, settings: dict, rows: list[LosslessRow]) -> None:
    data = {"machine": machine(), "settings": settings, "rows": [row.as_data() for row in rows]}
    file.write_text(json.dumps(data, indent=1) + "\n")

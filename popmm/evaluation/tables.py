"""Evaluation rows as Markdown, JSON and a picture."""

from __future__ import annotations

import json
import platform
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from popmm.evaluation.evaluate import Row

if TYPE_CHECKING:
    from popmm.evaluation.answers import AnswerRow
    from popmm.evaluation.tasks import TaskRow


def rows_to_markdown(rows: list[Row], exact: bool = False) -> str:
    """Rows as a Markdown table.

    Args:
        exact: whether the continuations are answers, whose exactness counts.
    """
    last = "exact answers" if exact else "same greedy tokens"
    batches = any(r.batch > 1 for r in rows)
    lines = [
        f"| method | asked | {'batch | ' * batches}FFN bytes | skipped | perplexity | KL to dense | top-1 agreement | "
        f"{last} |",
        "|---" * (8 + batches) + "|",
    ]
    for r in rows:
        if r.bytes_wanted is not None:
            asked = f"{r.bytes_wanted:.0%} of bytes"
        else:
            asked = f"{r.ffn_ratio if r.pruning_ratio is None else r.pruning_ratio:.0%} pruned"
        skipped = "-" if r.channels_skipped is None else f"{r.channels_skipped:.1%}"
        end = "-" if r.prefix is None else f"{r.prefix:.1f} ± {r.prefix_spread:.1f}"
        if exact:
            end = f"{r.exact:.1%} ± {r.exact_spread:.1%}"
        cells = [
            f"{r.perplexity:.3f} ± {r.perplexity_spread:.3f}",
            f"{r.kl:.4f} ± {r.kl_spread:.4f}",
            f"{r.top1:.1%} ± {r.top1_spread:.1%}",
        ]
        batch = [str(r.batch)] * batches
        lines.append(f"| {' | '.join([r.method, asked, *batch, f'{r.bytes_share:.1%}', skipped, *cells, end])} |")
    first = rows[0]
    lines.append(
        f"\n{first.texts} texts in {first.subsets} disjoint subsets; ± is the spread over subsets. "
        "Skipped: share of a token's FFN channels that are not computed."
        + " FFN bytes of a batch: of what its dense step reads."
        * batches
    )
    return "\n".join(lines)


def model_name(model: str) -> str:
    """A hub id or ``zoo:NAME`` as it is, a folder by its last part."""
    return Path(model).name if Path(model).exists() else model


def rows_to_json(rows: list[Row] | list[AnswerRow] | list[TaskRow], args: Namespace) -> str:
    """Rows with what they were measured on."""
    return to_json(described(args) | {"rows": [asdict(row) for row in rows]})


def to_json(data: dict) -> str:
    return json.dumps(data, indent=1)


def described(args: Namespace) -> dict[str, dict[str, str]]:
    """What a command was given, files by their names, and on which versions it ran."""
    paths = ("json", "plot", "text", "include_path", "task_file")
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("run", *paths)}
    settings["text"] = args.text.name if args.text else "own samples"
    settings["model"] = model_name(args.model)
    files = (given.partition("=") for given in args.task_file or ())
    settings["task_file"] = ", ".join(f"{task}={Path(file).name}" for task, _, file in files)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.processor()}
    return {"settings": settings, "versions": versions}

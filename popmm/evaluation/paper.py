"""The paper's tables on one model, from data that is given: what each needs, and the rows of those that need no task.

Tables are told by what they measure (arXiv 2602.06822).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from popmm.attach import pruned
from popmm.budget import ffn_ratio
from popmm.config import PopConfig
from popmm.evaluation.evaluate import Case, Row, Wanted, evaluate
from popmm.evaluation.presets import PRESETS, RATIOS
from popmm.evaluation.tasks import Setting, at_ratios

GAMMAS = (0.05, 0.1, 0.2)
DEFAULT = "popmm's default"
ELSEWHERE = (
    ("visual question answering", "needs lmms-eval and its data: docs/evaluation.md"),
    ("instance segmentation (SAM)", "not run: only a prompt pass, no language model"),
    ("time of a token", "popmm bench --selections mask,keep --ratios 0.2,0.4 --bytes 0.33 --prompt-tokens 128"),
)


@dataclass
class RatioRow:
    """What a target ratio of the blocks' weights asks of the FFNs."""

    pruning_ratio: float
    ffn_ratio: float


@dataclass
class PassRow:
    """Perplexity of texts that are read in one pass."""

    method: str
    pruning_ratio: float
    perplexity: float
    tokens: int


def ratio_rows(model) -> list[RatioRow]:
    """The FFN ratios of table 8 for a model."""
    return [RatioRow(ratio, ffn_ratio(model, ratio)) for ratio in RATIOS]


def settings_for(preset: str) -> list[Setting]:
    """The paper's settings at 20 and 40 %, and popmm's default, which decodes each prompt by itself."""
    how = PRESETS[preset]
    dense, *own = at_ratios(how.config, list(how.ratios), how.scoring, how.batch)
    return [dense, *(replace(setting, name=f"POP, {setting.name}") for setting in own), Setting(DEFAULT, PopConfig())]


def given_and_missing(preset: str, files: dict) -> tuple[list[str], list[str]]:
    """A preset's tasks: those with a local file, and the others."""
    tasks = PRESETS[preset].tasks
    return [task for task in tasks if task in files], [task for task in tasks if task not in files]


@torch.no_grad()
def pass_rows(model, cases: list[Case]) -> list[PassRow]:
    """Perplexity of whole texts in one pass, dense and with the paper's pruned prompt pass.

    Args:
        cases: batch 1; prompt and continuation are read together, and every token but the first counts.
    """
    texts = [torch.cat([case.inputs["input_ids"][0], case.tokens]) for case in cases]
    rows = []
    for ratio in (0.0, *RATIOS):
        with pruned(model, PopConfig.paper(pruning_ratio=ratio)):
            loss = 0.0
            for ids in texts:
                # with a cache, as a prompt is read
                logits = model(ids[None], use_cache=True).logits[0, :-1]
                loss += F.cross_entropy(logits.float(), ids[1:], reduction="sum").item()
        n_tokens = sum(len(ids) - 1 for ids in texts)
        rows.append(PassRow("POP" if ratio else "dense", ratio, math.exp(min(loss / n_tokens, 700.0)), n_tokens))
    return rows


def mask_rows(model, subsets: list[list[Case]]) -> list[Row]:
    """Decoding by masks that are fixed, re-scored in bands of several widths, and re-scored in full, at the same ratio.

    The paper has means over its generation tasks here; these are texts decoded teacher-forced.
    """
    names = {"prompt mask": "fixed after the prompt", "all re-scored": "all re-scored"}
    found: dict[tuple[float, str], Row] = {}
    for gamma in GAMMAS:
        base = PopConfig.paper(candidate_fraction=gamma)
        methods = ["mask", *(names if gamma == PopConfig.paper().candidate_fraction else ())]  # the others have no band
        dense, *rows = evaluate(model, subsets, [Wanted(m, r) for r in RATIOS for m in methods], base)
        for row in rows:
            name = names.get(row.method, f"POP, gamma {gamma}")
            found[row.pruning_ratio, name] = replace(row, method=name)
    order = [names["prompt mask"], *(f"POP, gamma {gamma}" for gamma in GAMMAS), names["all re-scored"]]
    # no row of the default: of widths that tiers cannot take
    _, *ours = evaluate(model, subsets, [Wanted("tiers", bytes_share=PopConfig().bytes)], PopConfig())
    return [
        dense,
        *(found[ratio, name] for ratio in RATIOS for name in order),
        *(replace(row, method=DEFAULT) for row in ours),
    ]

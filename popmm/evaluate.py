"""Quality of pruned decoding: a context is read as prompt, its continuation decoded teacher-forced.

Likelihood scored in one pass would never decode, and so measure the dense model. Here the continuation
goes through ``PartitionState.simulated_decode``: one pass, with a mask per token, equal to decoding token
by token. Every method is compared with the dense model's own distribution at the same positions.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
import transformers
from rich.progress import Progress
from torch import Tensor

from popmm.adapters import describe
from popmm.attach import attach_with, detach
from popmm.budget import RegionSizes, region_sizes
from popmm.config import PopConfig
from popmm.importance import ChannelStatistics

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Method:
    """A way to choose channels, as a setting of the library's own parts."""

    config: Callable[[PopConfig], PopConfig]
    sizes: Callable[[int, float, float], RegionSizes] = region_sizes
    experts_importance: Callable[[ChannelStatistics], Tensor] | None = None  # replaces that of experts
    experts_only: bool = False


def _random_scores(h: Tensor, down_norm: Tensor) -> Tensor:
    scores = torch.rand(h.shape[-1], generator=torch.Generator().manual_seed(0))
    return scores.to(h.device).expand_as(h)


def _all_candidates(d_ff: int, ffn_ratio: float, candidate_fraction: float) -> RegionSizes:
    return RegionSizes(d_ff, region_sizes(d_ff, ffn_ratio, 0).budget, retained=0, candidate=d_ff)


def _pooled(statistics: ChannelStatistics) -> Tensor:
    """One importance for all experts of a layer."""
    squares = statistics.squares
    return squares.sum(0, keepdim=True).sqrt().float().expand(squares.shape)


METHODS: dict[str, Method] = {
    "random": Method(
        lambda c: c.replace(selection="keep", candidate_fraction=0.0, importance=_random_scores, prior_tokens=0.0)
    ),
    "prompt mask": Method(lambda c: c.replace(selection="mask", candidate_fraction=0.0)),
    "mask": Method(lambda c: c.replace(selection="mask")),
    "keep": Method(lambda c: c.replace(selection="keep")),
    "gate": Method(lambda c: c.replace(selection="gate")),
    "gate, 8 bit": Method(lambda c: c.replace(selection="gate", gate_bits=8)),
    "gate, 4 bit": Method(lambda c: c.replace(selection="gate", gate_bits=4)),
    "all re-scored": Method(lambda c: c.replace(selection="mask"), _all_candidates),
    "mask, experts share a partition": Method(
        lambda c: c.replace(selection="mask"), experts_importance=_pooled, experts_only=True
    ),
    "mask, prior for unseen experts only": Method(
        lambda c: c.replace(selection="mask", prior_tokens=0.0), experts_only=True
    ),
}


def methods_for(model) -> list[str]:
    """Names of the methods that apply to a model."""
    has_experts = any(site.is_experts for site in describe(model, probe=False).sites())
    return [name for name, method in METHODS.items() if has_experts or not method.experts_only]


@dataclass
class Row:
    """Quality of one method at one ratio: mean over texts, and the spread over subsets."""

    method: str
    pruning_ratio: float
    bytes_share: float  # FFN weight bytes per token, of dense
    perplexity: float
    perplexity_spread: float
    kl: float  # KL(dense || pruned) per token, nats
    kl_spread: float
    top1: float  # share of positions with the dense model's likeliest token
    top1_spread: float
    texts: int
    subsets: int


@torch.no_grad()
def continuation_logits(model, ids: Tensor, context: int, decode) -> Tensor:
    """Logits ``[n - 1, vocab]``, float32, at the positions of a text's continuation.

    Args:
        ids: token ids ``[context + n]``; the first ``context`` are the prompt.
        decode: context manager factory around the continuation's pass.
    """
    cache = model(ids[None, :context], use_cache=True).past_key_values
    with decode():
        return model(ids[None, context:-1], past_key_values=cache).logits[0].float()


def evaluate(
    model,
    subsets: list[list[Tensor]],
    methods: list[str],
    ratios: list[float],
    base: PopConfig,
    context: int,
    of: str = "pruning_ratio",
) -> list[Row]:
    """Rows for every method and ratio, the dense model first.

    Args:
        subsets: disjoint subsets of texts, each a list of token id tensors ``[n_tokens]``.
        methods: keys of ``METHODS``.
        ratios: pruning ratios, or FFN ratios if ``of`` is ``"ffn_ratio"``.
        base: settings that the methods change.
        context: how many tokens of each text are the prompt.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}: give some of {', '.join(map(repr, METHODS))}")
    dense = [[continuation_logits(model, ids, context, nullcontext) for ids in texts] for texts in subsets]
    rows = [_row("dense", 0.0, 1.0, [_score(d, d, s, context) for d, s in zip(dense, subsets)], subsets)]
    with Progress(transient=True) as progress:
        bar = progress.add_task("evaluating", total=len(methods) * len(ratios))
        for ratio in ratios:
            for name in methods:
                method = METHODS[name]
                state = attach_with(model, method.config(base.replace(**{of: ratio})), method.sizes)
                try:
                    if method.experts_importance is not None:
                        state.rank_experts_by(method.experts_importance)
                    scores = []
                    for texts, reference in zip(subsets, dense):
                        logits = [continuation_logits(model, ids, context, state.simulated_decode) for ids in texts]
                        scores.append(_score(logits, reference, texts, context))
                    read, everything = state.bytes_per_token()
                finally:
                    detach(model)
                rows.append(_row(name, ratio, read / everything, scores, subsets))
                progress.advance(bar)
    return rows


def _score(logits: list[Tensor], dense: list[Tensor], texts: list[Tensor], context: int) -> tuple[float, float, float]:
    """(cross entropy, KL to dense, top-1 agreement) per token over the texts of a subset."""
    own, reference = torch.cat(logits).log_softmax(-1), torch.cat(dense).log_softmax(-1)
    targets = torch.cat([ids[context + 1 :] for ids in texts])
    entropy = F.nll_loss(own, targets).item()
    kl = F.kl_div(own, reference, log_target=True, reduction="batchmean").item()
    return entropy, kl, (own.argmax(-1) == reference.argmax(-1)).float().mean().item()


def _row(method: str, ratio: float, share: float, scores: list[tuple], subsets: list[list[Tensor]]) -> Row:
    entropies, kls, agreements = zip(*scores)
    perplexities = [math.exp(value) for value in entropies]

    def spread(values) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    return Row(
        method,
        ratio,
        share,
        statistics.mean(perplexities),
        spread(perplexities),
        max(statistics.mean(kls), 0.0),
        spread(kls),
        statistics.mean(agreements),
        spread(agreements),
        sum(map(len, subsets)),
        len(subsets),
    )


def subsets_of_text(model, tokenizer, args: Namespace) -> list[list[Tensor]]:
    """Token ids of ``args.subsets`` disjoint subsets of the texts in a file, or of the model's own samples."""
    wanted = args.subsets * args.texts_per_subset
    length = args.context + args.continuation
    if args.text is None:
        texts = _own_samples(model, tokenizer, wanted, length)
    else:
        stories = [story.strip() for story in args.text.read_text(encoding="utf-8").split(SEPARATOR)]
        stories = [story for story in stories if story]
        stories = stories[round(args.start * len(stories)) :]
        cut = dict(truncation=True, max_length=length)
        encoded = (torch.tensor(tokenizer(story, **cut)["input_ids"]) for story in stories)
        texts = [ids.to(model.device) for ids in encoded if len(ids) >= args.context + 8]
    if len(texts) < wanted:
        raise ValueError(
            f"{len(texts)} texts of at least {args.context + 8} tokens, but {args.subsets} subsets of "
            f"{args.texts_per_subset} need {wanted}: give a longer file, or lower --texts-per-subset or --context"
        )
    return [texts[i * args.texts_per_subset : (i + 1) * args.texts_per_subset] for i in range(args.subsets)]


def _own_samples(model, tokenizer, n: int, length: int) -> list[Tensor]:
    """Texts sampled from the dense model itself, from its start token."""
    torch.manual_seed(0)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((n, 1), start, device=model.device)
    texts = model.generate(ids, do_sample=True, max_new_tokens=length - 1, min_new_tokens=length - 1)
    return list(texts)


def rows_to_markdown(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    lines = [
        "| method | pruned | FFN bytes | perplexity | KL to dense | top-1 agreement |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.method} | {r.pruning_ratio:.0%} | {r.bytes_share:.1%} "
            f"| {r.perplexity:.3f} ± {r.perplexity_spread:.3f} "
            f"| {r.kl:.4f} ± {r.kl_spread:.4f} | {r.top1:.1%} ± {r.top1_spread:.1%} |"
        )
    first = rows[0]
    lines.append(f"\n{first.texts} texts in {first.subsets} disjoint subsets; ± is the spread over subsets.")
    return "\n".join(lines)


def rows_to_json(rows: list[Row], args: Namespace) -> str:
    """Rows with what they were measured on."""
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("run", "json", "text")}
    settings["text"] = args.text.name if args.text else "own samples"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.processor()}
    return json.dumps({"settings": settings, "versions": versions, "rows": [asdict(row) for row in rows]}, indent=1)

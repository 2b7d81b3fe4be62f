"""Texts as evaluation cases: a prompt of fixed length, and what follows it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from popmm.conversation import tokenizer_of
from popmm.evaluate import Case

SEPARATOR = "<|endoftext|>"
LEAST = 8  # tokens of a continuation


def read_texts(file: Path) -> list[str]:
    """The texts of a file, separated by ``<|endoftext|>``."""
    texts = [text.strip() for text in file.read_text(encoding="utf-8").split(SEPARATOR)]
    return [text for text in texts if text]


def encode_texts(tokenizer, texts: list[str], context: int, continuation: int, device) -> list[Tensor]:
    """Token ids ``[n]`` of those texts that are long enough."""
    cut = dict(truncation=True, max_length=context + continuation)
    encoded = (torch.tensor(tokenizer(text, **cut)["input_ids"]) for text in texts)
    return [ids.to(device) for ids in encoded if len(ids) >= context + LEAST]


def own_samples(model, tokenizer, n: int, length: int) -> list[Tensor]:
    """Texts sampled from the dense model itself, from its start token."""
    torch.manual_seed(0)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((n, 1), start, device=model.device)
    texts = model.generate(ids, do_sample=True, max_new_tokens=length - 1, min_new_tokens=length - 1)
    return list(texts)


def cases_of(texts: list[Tensor], context: int) -> list[Case]:
    """The first ``context`` tokens as prompt. The continuation's first token comes of the prompt pass."""
    return [Case({"input_ids": ids[None, :context]}, ids[context:]) for ids in texts]


def text_cases(
    model,
    tokenizer,
    file: Path | None,
    start: float,
    context: int,
    continuation: int,
    subsets: int,
    per_subset: int,
    calibration: int,
) -> tuple[list[list[Case]], list[Case]]:
    """(disjoint subsets of cases, calibration cases) from a file, or from the model's own samples.

    Args:
        start: share of the file's texts to skip; calibration takes its own from the file's beginning,
            and never one that is evaluated.

    Raises:
        ValueError: too few texts are long enough, or a wrong start or continuation.
    """
    if continuation < LEAST or not 0 <= start < 1:
        raise ValueError(
            f"continuation={continuation}, start={start}: give a continuation of {LEAST} tokens or more, "
            "and the share of the texts to skip, from 0 to below 1"
        )
    wanted, tokenizer = subsets * per_subset, tokenizer_of(tokenizer)
    if file is None:
        texts = own_samples(model, tokenizer, wanted + calibration, context + continuation)
        texts, others = texts[:wanted], texts[wanted:]
    else:
        everything = read_texts(file)
        first = round(start * len(everything))
        texts = encode_texts(tokenizer, everything[first:], context, continuation, model.device)
        before = everything[: min(first, 4 * calibration)]
        others = encode_texts(tokenizer, before, context, continuation, model.device)[:calibration]
        others = others + texts[wanted : wanted + calibration - len(others)]
    if len(texts) < wanted:
        raise ValueError(
            f"{len(texts)} texts of at least {context + LEAST} tokens, but {subsets} subsets of "
            f"{per_subset} need {wanted}: give a longer file, or lower --texts-per-subset or --context"
        )
    cases = cases_of(texts[:wanted], context)
    return [cases[i * per_subset : (i + 1) * per_subset] for i in range(subsets)], cases_of(others, context)

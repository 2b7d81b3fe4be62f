"""Texts as evaluation cases: a prompt of fixed length, and what follows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from popmm.evaluation.evaluate import Case
from popmm.evaluation.progress import progress
from popmm.zoo.encoding import encode, tokenizer_of

TEXTS_PER_SUBSET = 30
SEPARATOR = "<|endoftext|>"
FIELDS = ("question", "prompt", "text")  # of a JSON line, that is asked
LEAST = 8  # tokens of a continuation
PIECE = 20_000  # characters of an undivided text that are encoded at once


def read_texts(file: Path) -> list[str]:
    """The texts of a file, separated by ``<|endoftext|>``; an ordinary text is one.

    Raises:
        ValueError: it is no UTF-8 text, or holds nothing.
    """
    try:
        texts = [text.strip() for text in file.read_text(encoding="utf-8").split(SEPARATOR)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None
    found = [text for text in texts if text]
    if not found:
        raise ValueError(f"{file} is empty: give a text")
    return found


def read_questions(file: Path, n: int | None = None) -> list[tuple[str, str | None]]:
    """(question, its answer if there is one) of the first ``n`` JSON lines of a file.

    Raises:
        ValueError: a line is no JSON object, or asks nothing.
    """
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()][:n]
    try:
        found = [json.loads(line) for line in lines]
        questions = [next(line[name] for name in FIELDS if name in line) for line in found]
    except (json.JSONDecodeError, TypeError, StopIteration):
        questions = []
    if not questions:
        raise ValueError(f"{file}: each line is to be a JSON object with one of {', '.join(FIELDS)}")
    return [(question, line.get("answer")) for question, line in zip(questions, found)]


def question_cases(tokenizer, file: Path, continuation: int, n: int, device) -> list[Case]:
    """The first ``n`` questions as prompts, in the chat template where there is one, and their answers' tokens.

    Raises:
        ValueError: a question has no answer.
    """
    asked = read_questions(file, n)
    if any(answer is None for _, answer in asked):
        raise ValueError(f"{file}: each line is to have an answer too, which is decoded after the question")
    found = []
    for question, answer in asked:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"][:continuation]
        tokens = torch.tensor(ids, dtype=torch.int64, device=device)
        found.append(Case(encode(tokenizer, question, device), tokens))
    return [case for case in found if len(case.tokens) >= LEAST]


def encode_texts(tokenizer, texts: list[str], context: int, continuation: int, device) -> list[Tensor]:
    """Token ids ``[n]`` of those texts that are long enough."""
    cut = dict(truncation=True, max_length=context + continuation)
    encoded = (torch.tensor(tokenizer(text, **cut)["input_ids"], dtype=torch.int64, device="cpu") for text in texts)
    return [ids.to(device) for ids in encoded if len(ids) >= context + LEAST]


def windows(tokenizer, text: str, length: int, most: int, device) -> list[Tensor]:
    """The first ``most`` windows of ``length`` tokens of one text, consecutive and disjoint, int64 ``[length]`` each.

    Where the tokenizer begins texts with a token of its own, each window begins with it.
    """
    begin = _begin(tokenizer)
    own, ids, found = length - len(begin), [], []
    for piece in _pieces(text):
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        while len(ids) >= own and len(found) < most:
            found.append(torch.tensor(begin + ids[:own], dtype=torch.int64, device=device))
            ids = ids[own:]
        if len(found) == most:
            break
    return found


def _begin(tokenizer) -> list[int]:
    """Tokens that the tokenizer puts before a text."""
    first = tokenizer.bos_token_id
    return [first] if first is not None and tokenizer("a")["input_ids"][:1] == [first] else []


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of whole lines, or of whole words where a line is longer."""
    while len(text) > PIECE:
        cut = max(text.rfind("\n", 0, PIECE), 0) or max(text.rfind(" ", 0, PIECE), 0) or PIECE
        yield text[:cut]
        text = text[cut:]
    yield text


def own_samples(model, tokenizer, n: int, length: int) -> list[Tensor]:
    """Texts sampled from the dense model itself, from its start token."""
    torch.manual_seed(0)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((n, 1), start, dtype=torch.int64, device=model.device)
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
    per_subset: int | None,
    calibration: int,
) -> tuple[list[list[Case]], list[Case]]:
    """(disjoint subsets of cases, calibration cases) from a file, or from the model's own samples.

    A file without ``<|endoftext|>`` is read in consecutive, disjoint windows of context and continuation; of one of
    JSON lines the questions are prompts, whatever their length, and the answers are decoded.

    Args:
        start: share of the file's texts (of one text, of its characters) to skip; calibration takes its own from the
            file's beginning, and never one that is evaluated.
        per_subset: None = 30, or as many as there are.

    Raises:
        ValueError: too few texts are long enough, or a wrong start or continuation.
    """
    if not 0 <= start < 1:
        raise ValueError(f"start={start}: give the share of the texts to skip, from 0 to below 1")
    if continuation < LEAST:
        raise ValueError(f"continuation={continuation}: give a continuation of {LEAST} tokens or more")
    wanted, tokenizer = subsets * (per_subset or TEXTS_PER_SUBSET), tokenizer_of(tokenizer)
    others: list[Case] = []
    if file is None:
        with progress() as bars:
            bars.add_task("the model's own samples", total=None)
            samples = own_samples(model, tokenizer, wanted + calibration, context + continuation)
        found, what = cases_of(samples, context), "samples"
    elif file.suffix == ".jsonl":
        if start:
            raise ValueError(f"start={start}: questions are read from the first on; leave it out")
        found, what = question_cases(tokenizer, file, continuation, wanted + calibration, model.device), "questions"
    else:
        texts, before, what = _from_file(
            tokenizer, read_texts(file), start, context, continuation, wanted, calibration, model.device
        )
        found, others = cases_of(texts, context), cases_of(before, context)
    if per_subset is None:
        per_subset = min(TEXTS_PER_SUBSET, len(found) // subsets)
    if per_subset == 0 or len(found) < subsets * per_subset:
        raise ValueError(
            f"{len(found)} {what}, but {subsets} subsets of {max(per_subset, 1)} need {subsets * max(per_subset, 1)}: "
            "give a longer file, or lower --texts-per-subset, --subsets or --context"
        )
    spare = found[subsets * per_subset :]
    return [found[i * per_subset : (i + 1) * per_subset] for i in range(subsets)], (others + spare)[:calibration]


def _from_file(
    tokenizer, texts: list[str], start: float, context: int, continuation: int, wanted: int, calibration: int, device
) -> tuple[list[Tensor], list[Tensor], str]:
    """(token ids to evaluate, token ids to calibrate on, what they are)."""
    if len(texts) == 1:
        length, first = context + continuation, round(start * len(texts[0]))
        found = windows(tokenizer, texts[0][first:], length, wanted + calibration, device)
        before = windows(tokenizer, texts[0][:first], length, calibration, device)
        return found, before, f"windows of {length} tokens"
    first = round(start * len(texts))
    found = encode_texts(tokenizer, texts[first:], context, continuation, device)
    before = texts[: min(first, 4 * calibration)]
    others = encode_texts(tokenizer, before, context, continuation, device)[:calibration]
    return found, others, f"texts of at least {context + LEAST} tokens"

"""What the command line's arguments say, checked without loading torch: wrong ones are refused at once."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from popmm.config import PopConfig

RATIOS = "0.1,0.2,0.3,0.4"  # that popmm eval measures unless told
TEXTS_PER_SUBSET = 30  # as in popmm.evaluation.texts, which loads torch
PICTURE_PROMPT = "What is in the picture?"
DEMO_PROMPT = "Once upon a time there was a little girl named Lily. She had a red ball and"
SECOND_PROMPT = "The old man looked at the sea. He wanted to catch a fish, but the waves were big and"


def config_from(args: argparse.Namespace) -> PopConfig:
    names = ("pruning_ratio", "ffn_ratio", "selection", "candidate_fraction", "importance", "fill", "prefill")
    names += (
        "prior_tokens",
        "modality_balance",
        "vision",
        "gate_bits",
        "weight_bits",
        "rest_bits",
        "statistics",
        "weights",
        "layout",
        "refresh_every",
        "lossless",
        "draft_tokens",
    )
    given = {name: getattr(args, name, None) for name in names}
    if isinstance(getattr(args, "bytes", None), float):  # eval's is a list of shares, for its methods
        given["bytes"] = args.bytes
    return PopConfig(**{name: value for name, value in given.items() if value is not None})


def generation_settings(args: argparse.Namespace) -> dict:
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: give 1 or more")
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature}: give 0 (greedy) or more, such as 0.7")
    settings = dict(max_new_tokens=args.max_new_tokens, do_sample=args.temperature > 0)
    if args.temperature > 0:
        settings["temperature"] = args.temperature
    return settings


def prompt_from(args: argparse.Namespace) -> str:
    """The prompt, read from stdin if it is ``-``."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        where = " (stdin)" if args.prompt == "-" else ""
        raise ValueError(f"the prompt{where} is empty: give at least one word")
    return prompt.removesuffix("\n") if args.prompt == "-" else prompt


def batches(given: str | None) -> list[int]:
    """The numbers of ``--batch``; 1 unless given."""
    parts = [part.strip() for part in (given or "1").split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--batch {given}: give numbers of sequences, such as 1,2,4,8,16")
    return [int(part) for part in parts]


def check_folders(*files: Path | None) -> None:
    """Refuses files to write whose folder is not there."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{file}: there is no folder {file.parent}")


PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")  # that matplotlib writes


def check_pictures(*files: Path | None) -> None:
    """Refuses pictures to write whose folder is not there or whose format is none."""
    check_folders(*files)
    for file in files:
        if file is not None and file.suffix.lower() not in PICTURES:
            raise ValueError(f"{file}: give a name that ends in one of {', '.join(PICTURES)}")


def listed(text: str, known: Iterable[str] = ()) -> list[str]:
    """Names separated by commas, or semicolons; a known name that holds a comma itself is one name."""
    by_form = {_form(name): name for name in known}
    found = []
    for part in text.split(";"):
        words = [word.strip() for word in part.split(",")]
        while words:
            for n in range(len(words), 0, -1):
                name = ", ".join(words[:n])
                if n == 1 or _form(name) in by_form:
                    found.append(by_form.get(_form(name), name))
                    words = words[n:]
                    break
    return [name for name in found if name]


def _form(name: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"\s*,\s*", ",", name)).strip()


def numbers(text: str) -> list[float]:
    """Numbers separated by commas."""
    try:
        return [float(number) for number in listed(text)]
    except ValueError:
        raise ValueError(f"{text!r}: give numbers separated by commas, such as 0.7,0.5") from None

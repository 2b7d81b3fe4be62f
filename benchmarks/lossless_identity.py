"""How often lossless decoding gives the dense model's text, and how near the two best tokens are where it does not.

    python benchmarks/lossless_identity.py --model PATH --text FILE --prompts 200 --tokens 64 --dtype float32

Greedy. A pass of several tokens rounds otherwise than several passes of one: where texts part, the margin between the
dense model's two best logits is printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import popmm
from popmm.cli.bench_lossless import prompts
from popmm.evaluation.progress import progress
from popmm.zoo.encoding import tokenizer_of
from popmm.zoo.loading import load_model


def parting(model, ours: torch.Tensor, dense: torch.Tensor, start: int) -> tuple[int, float] | None:
    """Where two texts part, in tokens after ``start``, and the dense model's margin there; None where they do not."""
    differ = (ours[0, start:] != dense[0, start:]).nonzero()
    if not len(differ):
        return None
    place = start + int(differ[0])
    with torch.no_grad():
        best = model(dense[:, :place]).logits[0, -1].float().topk(2).values
    return place - start, float(best[0] - best[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="zoo:stories")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=["float64", "float32", "bfloat16"], default="float32")
    parser.add_argument("--draft-tokens", type=int, default=4)
    args = parser.parse_args()
    model, processor = load_model(args.model, "float32" if args.dtype == "float64" else args.dtype, "cpu")
    if args.dtype == "float64":
        model = model.to(torch.float64)
        model.set_experts_implementation("eager")  # torch's grouped product knows no float64
    texts = prompts(model, tokenizer_of(processor), args.text, args.prompts, args.prompt_tokens)
    how = dict(max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False)
    with progress() as bars:
        bar = bars.add_task("generating", total=2 * len(texts))
        dense = []
        for inputs in texts:
            dense.append(model.generate(**inputs, **how))
            bars.advance(bar)
        ours = []
        with popmm.pruned(model, lossless=True, draft_tokens=args.draft_tokens) as state:
            for inputs in texts:
                ours.append(model.generate(**inputs, **how))
                bars.advance(bar)
            passes = repr(state.passes)
    parted = [parting(model, a, b, t["input_ids"].shape[1]) for a, b, t in zip(ours, dense, texts)]
    parted = sorted((found for found in parted if found is not None), key=lambda found: -found[1])
    print(
        f"{args.model}, {args.dtype}: {len(texts) - len(parted)} of {len(texts)} texts of {args.tokens} tokens the same"
    )
    print(f"{passes}")
    print("margins where they part, the widest first (tokens after the prompt):")
    print(", ".join(f"{margin:.2g} ({place})" for place, margin in parted) or "none part")


if __name__ == "__main__":
    main()

"""`generate_batch` of an attached model against the dense one: tokens per second of so many conversations, in turn.

    python benchmarks/continuous_batching.py --model PATH --text FILE [--conversations 16] [--bytes 0.33] [--json FILE]

Prompts are windows of the text, of lengths from a quarter of ``--prompt-tokens`` to all of them. At ratio 0 each answer
is compared with the dense model's own by `generate`: other sums in another order may choose otherwise where two tokens
are nearly as likely, so the share of equal answers is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import popmm
from popmm.cli.bench_rows import machine
from popmm.evaluation.progress import progress
from popmm.evaluation.texts import windows
from popmm.zoo.encoding import tokenizer_of
from popmm.zoo.loading import load_model


def answers(model, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float]:
    """(each prompt's answer, seconds of all)."""
    blocks = sum(2 + (len(prompt) + new) // 256 for prompt in prompts)  # by itself it takes most of the memory
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = ContinuousBatchingConfig(max_batch_tokens=512, num_blocks=blocks)
    start = time.perf_counter()
    found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=room)
    seconds = time.perf_counter() - start
    return [found[key].generated_tokens for key in sorted(found, key=lambda key: int(key.split("_")[-1]))], seconds


def alone(model, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt], dtype=torch.int64, device=model.device)
    how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return model.generate(ids, **how)[0, len(prompt) :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="zoo:stories")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--bytes", default="0.33,0.25")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, processor = load_model(args.model, args.dtype, "cpu")
    text = args.text.read_text(encoding="utf-8")
    whole = windows(tokenizer_of(processor), text, args.prompt_tokens, args.conversations, model.device)
    least = args.prompt_tokens // 4
    lengths = [least + (args.prompt_tokens - least) * i // max(1, len(whole) - 1) for i in range(len(whole))]
    prompts = [ids[:n].tolist() for ids, n in zip(whole, lengths)]
    settings = {"dense": None, "ratio 0": dict(ffn_ratio=0.0)}
    settings |= {f"tiers, bytes {share}": dict(bytes=float(share)) for share in args.bytes.split(",")}
    times: dict[str, list[float]] = {name: [] for name in settings}
    passes: dict[str, str] = {}
    with progress() as bars:
        bar = bars.add_task("decoding", total=(args.rounds + 1) * len(settings) + len(prompts))
        own = []
        for prompt in prompts:
            own.append(alone(model, prompt, args.new_tokens))
            bars.advance(bar)
        for turn in range(args.rounds + 1):
            for name, how in settings.items():
                if how is None:
                    found, seconds = answers(model, prompts, args.new_tokens)
                else:
                    with popmm.pruned(model, statistics="weights", **how) as state:
                        found, seconds = answers(model, prompts, args.new_tokens)
                        passes[name] = repr(state.passes)
                if turn:  # the first one warms up
                    times[name].append(seconds)
                if name == "ratio 0":
                    equal = sum(a == b for a, b in zip(found, own)) / len(own)
                bars.advance(bar)
    tokens = len(prompts) * args.new_tokens
    rows = [
        dict(row=name, tokens_per_second=tokens / statistics.median(measured), passes=passes.get(name, ""))
        for name, measured in times.items()
    ]
    print("| row | tokens/s, prompts included | against dense | passes |\n|---|---|---|---|")
    for row in rows:
        speed = row["tokens_per_second"]
        print(f"| {row['row']} | {speed:.1f} | {speed / rows[0]['tokens_per_second']:.2f} | {row['passes']} |")
    print(f"\nAt ratio 0, answers equal to those of `generate`: {equal:.0%} of {len(prompts)}, {args.dtype}.")
    if args.json:
        given = {key: str(value) for key, value in vars(args).items() if key not in ("json", "text", "model")}
        data = {"machine": machine(), "settings": given, "equal_at_ratio_0": equal, "rows": rows}
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()

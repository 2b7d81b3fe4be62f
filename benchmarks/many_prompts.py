"""Sends every prompt of a file through one attached model, in batches: does anything fail, does memory grow?

python benchmarks/many_prompts.py --prompts gsm8k_test.jsonl --field question [--model zoo:stories] [--batch 8]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from rich.progress import track

import popmm
from popmm.zoo.loading import load_model


def resident() -> float:
    """Memory of this process, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines")
    parser.add_argument("--field", default="question", help="that holds the prompt (%(default)s)")
    parser.add_argument("--model", default="zoo:stories")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--selection", default=None)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, None, None)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    longest = model.config.get_text_config().max_position_embeddings - args.new_tokens
    prompts = [json.loads(line)[args.field] for line in args.prompts.read_text().splitlines() if line.strip()]
    batches = [prompts[i : i + args.batch] for i in range(0, len(prompts), args.batch)]
    memory, generated, start = [], 0, time.perf_counter()
    with popmm.pruned(model, pruning_ratio=0.4, selection=args.selection):
        for batch in track(batches, transient=True):
            inputs = tokenizer(batch, return_tensors="pt", padding=True, truncation=True, max_length=longest)
            inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
            how = dict(do_sample=False, min_new_tokens=args.new_tokens, max_new_tokens=args.new_tokens)
            out = model.generate(**inputs, **how, pad_token_id=tokenizer.pad_token_id)
            generated += out[:, inputs["input_ids"].shape[1] :].numel()
            memory.append(resident())
    seconds = time.perf_counter() - start
    quarter = len(memory) // 4
    found = {
        "model": args.model,
        "prompts": len(prompts),
        "batches": len(batches),
        "tokens_per_second": round(generated / seconds, 1),
        "prompts_per_second": round(len(prompts) / seconds, 2),
        "mib_after_a_quarter": round(max(memory[: quarter + 1]), 1),
        "mib_at_most": round(max(memory), 1),
        "torch": torch.__version__,
    }
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

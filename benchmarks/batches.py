"""Quality and speed of decode steps by batch size: tokens of a batch choose their channels together.

    python benchmarks/batches.py --model PATH --text FILE --batches 1,2,4,8 --bytes 0.328,0.266 [--json FILE]

Prompts of equal length, each batch's continuations decoded teacher-forced, one token per sequence and step, as users do
it; KL and top-1 against the dense model. ``int4`` to ``int8`` are the same planes with nothing chosen. Speed: seconds
per step of `generate` on the same batches, dense and pruned in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import popmm
from popmm.cli.bench_rows import machine
from popmm.compat import cache_argument, cache_of
from popmm.evaluation.progress import progress
from popmm.evaluation.texts import windows
from popmm.zoo.encoding import tokenizer_of
from popmm.zoo.loading import load_model


@torch.no_grad()
def followed(model, ids: Tensor, prompt: int) -> Tensor:
    """Log-probabilities ``[batch, n, vocabulary]`` of decode steps along ids ``[batch, prompt + n]``, float32."""
    out = model(ids[:, :prompt], use_cache=True)
    cache, found = cache_of(out), []
    for place in range(prompt, ids.shape[1]):
        kept = cache_argument(model, cache)
        found.append(model(ids[:, place : place + 1], use_cache=True, **kept).logits[:, -1].float().log_softmax(-1))
    return torch.stack(found, dim=1)


def quality(model, texts: Tensor, prompt: int, batch: int, dense: list[Tensor], bars, bar) -> tuple[float, float]:
    """(KL, top-1) over all texts, in batches."""
    kl, same = [], []
    for start in range(0, len(texts) - batch + 1, batch):
        ours = followed(model, texts[start : start + batch], prompt)
        whole = torch.stack(dense[start : start + batch])
        kl.append((whole.exp() * (whole - ours)).sum(-1).flatten())
        same.append((whole.argmax(-1) == ours.argmax(-1)).flatten())
        bars.advance(bar)
    return float(torch.cat(kl).mean()), float(torch.cat(same).float().mean())


def seconds_per_step(model, texts: Tensor, prompt: int, batch: int, new: int) -> float:
    ids, steps = texts[:batch, :prompt], _Steps()
    how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[steps], **how)
    return statistics.median(b - a for a, b in zip(steps.times[2:], steps.times[3:]))


class _Steps:
    """A criterion that notes when each step came: streamers serve one sequence alone."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: Tensor, scores, **kwargs) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="zoo:stories")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", default="1,2,4,8")
    parser.add_argument("--bytes", default="0.328,0.266,0.2")
    parser.add_argument("--plain", default="6,5,4", help="bits of rows that choose nothing")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, processor = load_model(args.model, args.dtype, "cpu")
    length = args.prompt_tokens + args.steps
    text = args.text.read_text(encoding="utf-8")
    texts = torch.stack(windows(tokenizer_of(processor), text, length, args.texts, model.device))
    batches = [int(n) for n in args.batches.split(",")]
    settings = {f"tiers {share}": dict(bytes=float(share)) for share in args.bytes.split(",")}
    settings |= {f"int{bits}": dict(weight_bits=int(bits)) for bits in args.plain.split(",") if bits}
    rows = []
    with progress() as bars:
        bar = bars.add_task("decoding", total=len(texts) + len(settings) * sum(len(texts) // n for n in batches))
        dense = []
        for ids in texts:
            dense.append(followed(model, ids[None], args.prompt_tokens)[0])
            bars.advance(bar)
        step = {n: seconds_per_step(model, texts, args.prompt_tokens, n, args.steps) for n in batches}
        for name, how in settings.items():
            with popmm.pruned(model, **how) as state:
                pruned, whole = state.bytes_per_token()
                for n in batches:
                    kl, top1 = quality(model, texts, args.prompt_tokens, n, dense, bars, bar)
                    seconds = seconds_per_step(model, texts, args.prompt_tokens, n, args.steps)
                    rows.append(dict(row=name, batch=n, kl=kl, top1=top1, of_dense_bytes=pruned / whole))
                    rows[-1] |= dict(tokens_per_second=n / seconds, dense_tokens_per_second=n / step[n])
    print("| row | batch | KL | top-1 | tokens/s | dense tokens/s |\n|---|---|---|---|---|---|")
    for row in rows:
        speeds = f"{row['tokens_per_second']:.1f} | {row['dense_tokens_per_second']:.1f}"
        print(f"| {row['row']} | {row['batch']} | {row['kl']:.4f} | {row['top1']:.3f} | {speeds} |")
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        args.json.write_text(json.dumps({"machine": machine(), "settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

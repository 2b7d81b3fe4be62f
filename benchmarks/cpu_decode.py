"""Decode speed of random models at real layer sizes on the CPU: dense against POP, interleaved.

    python benchmarks/cpu_decode.py [--form dense|moe] [--dtypes float32,bfloat16] [--json FILE]

Weights are random: speed does not depend on them, and quality is measured elsewhere. Rows take turns in
short rounds, so that drift of the machine hits all alike. The baseline is the fastest dense path here.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from pathlib import Path

import torch
import transformers
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import popmm

FORMS = {
    "dense": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
    ),
    "moe": MixtralConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=16,
        num_experts_per_tok=2,
        vocab_size=32000,
    ),
}
RATIOS = (0.2, 0.4)
PROMPT, STEPS = 64, 8


def random_model(form: str, dtype: torch.dtype):
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return AutoModelForCausalLM.from_config(FORMS[form]).eval()
    finally:
        torch.set_default_dtype(previous)


@torch.inference_mode()
def decode_ms(model, ids: torch.Tensor, experts: str | None = None) -> tuple[float, float]:
    """(milliseconds per decoded token, seconds of the prompt pass); ``experts`` runs the decode steps."""
    start = time.perf_counter()
    output = model(ids, use_cache=True)
    prefill = time.perf_counter() - start
    cache, token = output.past_key_values, ids[:, -1:]
    if experts is not None:
        model.set_experts_implementation(experts)
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        model(token, past_key_values=cache)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3, prefill


def rows_of(form: str, model) -> dict[str, tuple]:
    """Label: (config or None for dense, experts implementation or None)."""
    rows = {"dense": (None, None)}
    if form == "moe":
        rows = {f"dense {name}": (None, name) for name in ("eager", "batched_mm", "grouped_mm")}
    for selection in ("mask", "keep"):
        for ratio in RATIOS:
            rows[f"{selection} {ratio:.0%}"] = (popmm.PopConfig(pruning_ratio=ratio, selection=selection), None)
    return rows


def other_bytes(model) -> int:
    """Bytes of all weights that a decoded token reads outside the FFN sites: attention, router, head."""
    description = popmm.adapters.describe(model, probe=False)
    stacked = sum(p.numel() * p.element_size() for p in model.parameters())
    sites = sum(
        site.weights().bytes_per_channel() * site.weights().d_ff * max(site.n_experts, 1)
        for site in description.sites()
    )
    embedding = model.get_input_embeddings().weight
    tied = model.config.tie_word_embeddings
    return stacked - sites - (0 if tied else embedding.numel() * embedding.element_size())


def measure(form: str, dtype_name: str, rounds: int) -> list[dict]:
    model = random_model(form, getattr(torch, dtype_name))
    ids = torch.randint(0, 32000, (1, PROMPT))
    rows = rows_of(form, model)
    times = {label: [] for label in rows}
    prefills = {label: [] for label in rows}
    extra = {label: (1.0, 0.0, 0) for label in rows}
    outside = other_bytes(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    print(f"{form} {dtype_name}: {weights:.2f} GiB of weights")
    default = model.config._experts_implementation
    for turn in track(range(rounds + 1), description=f"{form} {dtype_name}"):
        for label, (config, experts) in rows.items():
            if form == "moe":
                model.set_experts_implementation(default)
            if config is None:
                ms, prefill = decode_ms(model, ids, experts)
            else:
                with popmm.pruned(model, config) as state:
                    ms, prefill = decode_ms(model, ids)
                    read, dense = state.bytes_per_token()
                    share = (read + outside) / (dense + outside)
                    extra[label] = (share, state.partition_seconds() * 1e3, state.buffer_bytes())
            if turn:  # the first round warms up
                times[label].append(ms)
                prefills[label].append(prefill * 1e3)
    medians = {label: statistics.median(t) for label, t in times.items()}
    best = min(ms for label, ms in medians.items() if label.startswith("dense"))
    return [
        {
            "form": form,
            "dtype": dtype_name,
            "row": label,
            "ms_per_token": round(medians[label], 2),
            "tokens_per_second": round(1e3 / medians[label], 2),
            "total_bytes_share": round(extra[label][0], 4),
            "speed_up": round(best / medians[label], 3),
            "of_bytes_ratio": round(best / medians[label] * extra[label][0], 3),
            "partition_ms": round(extra[label][1], 1),
            "partition_in_dense_steps": round(extra[label][1] / best, 2),
            "prefill_ms": round(statistics.median(prefills[label]), 1),
            "buffers_gib": round(extra[label][2] / 2**30, 2),
        }
        for label in rows
    ]


def table_of(rows: list[dict]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=list(FORMS), default="dense")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row for dtype in args.dtypes.split(",") for row in measure(args.form, dtype, args.rounds)]
    Console(width=180).print(table_of(rows))
    machine = {
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(machine)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

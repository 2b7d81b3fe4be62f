"""What the commands ``generate``, ``chat``, ``bench`` and ``demo`` do. Arguments are checked before torch is loaded."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys

from popmm.cli.arguments import (
    DEMO_PROMPT,
    batches,
    check_folders,
    check_pictures,
    config_from,
    generation_settings,
    listed,
    numbers,
    prompt_from,
)
from popmm.cli.terminal import print_json
from popmm.config import PLAIN_BITS, PopConfig
from popmm.evaluation.progress import for_people


def load_from(args: argparse.Namespace):
    from popmm.zoo.loading import load_model

    with for_people().status(f"loading {args.model}"):
        return load_model(args.model, args.dtype, args.device)


def generate(args: argparse.Namespace) -> None:
    config, settings, prompt = config_from(args), generation_settings(args), prompt_from(args)
    from popmm.zoo.encoding import check_length, encode, has_template, tokenizer_of

    model, processor = load_from(args)
    inputs = encode(processor, prompt, model.device, args.chat)
    check_length(model, inputs["input_ids"].shape[1], settings["max_new_tokens"])
    asked = args.chat if args.chat is not None else has_template(processor)
    advice = _when_empty(asked, has_template(processor))
    run = _compare if args.compare else _generate
    run(args, model, tokenizer_of(processor), inputs, config, settings, asked, advice)


def _when_empty(asked: bool, has_template: bool) -> str:
    """What to do when a model ends at once."""
    if asked:
        return "ask another question, or go on with the plain text by --no-chat"
    if has_template:
        return "ask in the model's chat template: leave --no-chat out"
    return "give a longer prompt, or one whose text has not come to its end"


def _generate(args, model, tokenizer, inputs, config, settings, asked, advice) -> None:
    import torch
    from transformers import TextStreamer

    from popmm.attach import pruned
    from popmm.cli.compare import drafts_of
    from popmm.report import human_bytes
    from popmm.runtime.clock import timed_generate

    with pruned(model, config) as state:
        torch.manual_seed(args.seed)
        streamer = None if args.json else TextStreamer(tokenizer, skip_prompt=asked, skip_special_tokens=True)
        tokens, seconds = timed_generate(model, inputs, streamer, **settings)
        read, dense = state.bytes_per_token()
        skipped, text = state.channels_skipped(), tokenizer.decode(tokens, skip_special_tokens=True)
        if args.json:
            print_json(
                {
                    "model": args.model,
                    "prompt_tokens": inputs["input_ids"].shape[1],
                    "text": text,
                    "tokens": len(tokens),
                    "tokens_per_second": 1 / seconds,
                    "ffn_bytes_per_token": read,
                    "dense_ffn_bytes_per_token": dense,
                    "channels_skipped": skipped,
                    "passes": dict(state.passes),
                    **drafts_of(state.passes, config.lossless),
                }
            )
        rate = "" if math.isnan(seconds) else f" at {1 / seconds:.1f} tokens/s"
        reading = "drafts reading" if config.lossless else "reading"
        for_people().print(
            f"{len(tokens)} tokens{rate}, {reading} {human_bytes(read)} of {human_bytes(dense)} FFN weights per token "
            f"({read / dense:.1%}), skipping {skipped:.1%} of the FFN channels",
            style="dim",
            soft_wrap=True,
        )
        if not text.strip():
            _say_empty("the model", advice)


def _say_empty(who: str, advice: str) -> None:
    for_people().print(f"nothing was generated: {who} ended at once; {advice}", style="yellow", soft_wrap=True)


def _compare(args, model, tokenizer, inputs, config, settings, asked, advice) -> None:
    from popmm.cli.compare import compare

    with for_people().status("generating"):
        runs = compare(model, inputs, {label(config): config}, seed=args.seed, **settings)
    show(runs, tokenizer, args.json, {"model": args.model, "prompt_tokens": inputs["input_ids"].shape[1]}, advice)


def show(runs: list, tokenizer, as_json: bool, about: dict, advice: str) -> None:
    """Texts to stdout, what they cost to stderr; or all of it as JSON to stdout."""
    from rich.console import Console

    from popmm.cli.compare import comparison_table, rows_of, text_of, texts_table

    if as_json:
        print_json({**about, "runs": rows_of(runs, tokenizer)})
    else:
        Console(highlight=False).print(texts_table(runs, tokenizer))
        for_people().print(comparison_table(runs))
    empty = [run.label for run in runs if not text_of(run, tokenizer)]
    if empty:
        _say_empty(" and ".join(empty), advice)


def label(config: PopConfig) -> str:
    if config.lossless:
        return "lossless"
    if config.bytes is not None:
        return f"{config.selection}, {config.bytes:.0%} of the 16-bit bytes read"
    if config.ffn_ratio is not None:
        return f"{config.selection}, {config.ffn_ratio:.0%} of channels pruned"
    return f"{config.selection}, {config.pruning_ratio:.0%} pruned"


def chat(args: argparse.Namespace) -> None:
    config, settings = config_from(args), generation_settings(args)
    import torch

    from popmm import zoo
    from popmm.cli.chat import chat
    from popmm.cli.images import open_image
    from popmm.zoo.encoding import takes_pictures

    for source in args.image:
        open_image(source)  # before the model is loaded
    model, processor = load_from(args)
    if args.image and not takes_pictures(processor):
        raise ValueError(f"--image: {args.model} reads text alone; give a vision-language model for pictures")
    sources = args.image or ([str(zoo.picture())] if args.model == "zoo:shapes" else [])
    torch.manual_seed(args.seed)
    chat(model, processor, config, sources, **settings)


def bench(args: argparse.Namespace) -> None:
    if (args.shape is None) == (args.model is None):
        raise ValueError("give either --shape, such as llama-3.1-8b, or --model")
    if args.lossless:
        return _bench_lossless(args)
    for name in ("prompt_tokens", "new_tokens", "rounds"):
        least = 8 if name == "new_tokens" else 1
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give {least} or more")
    check_folders(args.json)
    check_pictures(args.plot)
    ratios, selections, layouts = numbers(args.ratios), listed(args.selections), listed(args.layouts)
    shares, sizes = numbers(args.bytes) if args.bytes else [], batches(args.batch)
    from rich.console import Console

    from popmm.cli.bench import Bench, ways
    from popmm.cli.bench_rows import bench_table, machine, save_json
    from popmm.cli.plots import bench_figure
    from popmm.zoo.encoding import check_length

    model = load_from(args)[0] if args.model is not None else _random_model(args)
    check_length(model, args.prompt_tokens, args.new_tokens)
    compiled = args.compiled if args.compiled is not None else model.device.type != "cpu"
    if args.int8 and importlib.util.find_spec("torchao") is None:
        print("no int8 row: torchao is not installed (pip install torchao)", file=sys.stderr)
        args.int8 = False
    found = []
    for size in sizes:
        rows = ways(model, selections, ratios, layouts, compiled, args.int8, args.rest_bits, shares)
        found += Bench(model, size, args.prompt_tokens, args.new_tokens).run(rows, args.rounds)
    name = f"{args.shape or args.model}{' (tiny)' if args.tiny else ''}"
    title = f"{name}, {str(model.dtype).removeprefix('torch.')}, batch {args.batch}"
    Console(width=200).print(bench_table(found, title))
    for_people().print(", ".join(f"{name} {value}" for name, value in machine().items()), style="dim")
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items() if key not in ("run", "json", "plot")}
        save_json(args.json, {**settings, "title": title}, found)
    if args.plot:
        bench_figure(found, title, args.plot)


def _bench_lossless(args: argparse.Namespace) -> None:
    if (args.replay is None) != (args.model is not None):
        raise ValueError(
            "--lossless measures how often drafts are accepted: give --model, whose weights are trained, or --shape "
            "with --replay 0.94, say, the rate at which drafted tokens are taken to stand"
        )
    for name in ("prompt_tokens", "new_tokens", "texts"):
        if getattr(args, name) < 2:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 2 or more")
    if args.replay is not None and not 0 <= args.replay <= 1:
        raise ValueError(f"--replay {args.replay}: give a rate from 0 to 1, such as 0.94")
    check_folders(args.json)
    rest = None if args.rest_bits == PLAIN_BITS else args.rest_bits
    config = PopConfig(lossless=True, draft_tokens=args.draft_tokens, rest_bits=rest)
    from rich.console import Console

    from popmm.cli.bench_lossless import LosslessBench, lossless_table, prompts, random_prompts, save_lossless
    from popmm.zoo.encoding import check_length, tokenizer_of

    if args.model is not None:
        model, processor = load_from(args)
        texts = prompts(model, tokenizer_of(processor), args.text, args.texts, args.prompt_tokens)
    else:
        model = _random_model(args)
        texts = random_prompts(model, args.texts, args.prompt_tokens)
    check_length(model, args.prompt_tokens, args.new_tokens)
    assistant = None
    if args.assistant is not None:
        assistant, _ = load_from(argparse.Namespace(**{**vars(args), "model": args.assistant}))
    compiled = args.compiled if args.compiled is not None else True
    found = LosslessBench(model, config, args.new_tokens, compiled, assistant, args.replay).run(texts)
    dtype = str(model.dtype).removeprefix("torch.")
    title = f"{args.model or args.shape}, {dtype}, {len(texts)} texts of {args.new_tokens} new tokens"
    if args.replay is not None:
        title += f"; random weights, drafted tokens taken to stand at {args.replay}"
    Console(width=160).print(lossless_table(found, title))
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items() if key not in ("run", "json", "plot")}
        save_lossless(args.json, {**settings, "title": title}, found)


def _random_model(args: argparse.Namespace):
    """Random weights at the sizes of ``--shape``."""
    import torch

    from popmm.cli.shapes import random_model, shape_config
    from popmm.zoo.loading import DTYPES

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[args.dtype or ("float32" if device == "cpu" else "bfloat16")]
    return random_model(shape_config(args.shape, args.layers, args.tiny), dtype, device)


def demo(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: give 1 or more")
    from popmm import zoo
    from popmm.cli.compare import compare
    from popmm.zoo.encoding import check_length, encode

    model, tokenizer = zoo.load("stories")
    inputs = encode(tokenizer, DEMO_PROMPT, model.device)
    check_length(model, inputs["input_ids"].shape[1], args.max_new_tokens)
    configs = {f"{share:.0%} of the bytes": PopConfig(bytes=share) for share in (PopConfig().bytes, 0.25)}
    console = for_people()
    console.print(f'[bold]{DEMO_PROMPT}[/bold] ...\n\nThe bundled model "stories" goes on:')
    with console.status("generating"):
        runs = compare(model, inputs, configs, max_new_tokens=args.max_new_tokens, do_sample=False)
    show(runs, tokenizer, False, {}, _when_empty(False, False))
    console.print(
        "This model is tiny, so tokens/s here measure Python more than weights read; "
        "docs/speed.md has speeds at real sizes.",
        style="dim",
    )

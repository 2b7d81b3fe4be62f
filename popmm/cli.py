"""Command line: popmm generate | inspect | eval | demo."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from rich.console import Console

from popmm.config import PopConfig

DEMO_PROMPT = "Once upon a time there was a little girl named Lily. She had a red ball and"
SECOND_PROMPT = "The old man looked at the sea. He wanted to catch a fish, but the waves were big and"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="popmm", description="Online FFN pruning (POP) for transformers models.")
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="generate text, pruned")
    _add_model(generate)
    _add_config(generate)
    _add_generation(generate)
    generate.add_argument("--compare", action="store_true", help="run dense and pruned, show both and what they cost")
    generate.set_defaults(run=run_generate)

    inspect = commands.add_parser("inspect", help="show a prompt's partition as a table and a picture")
    _add_model(inspect)
    _add_config(inspect)
    _add_generation(inspect)
    inspect.add_argument("--second-prompt", default=SECOND_PROMPT, help="experts: compared with the first")
    inspect.add_argument("--out", type=Path, default=Path("popmm-inspect.png"), help="picture to write (%(default)s)")
    inspect.set_defaults(run=run_inspect)

    evaluate = commands.add_parser("eval", help="quality of pruned decoding against dense, on a text")
    _add_model(evaluate)
    _add_config(evaluate, ratio=False)
    evaluate.add_argument(
        "--text", type=Path, help="texts separated by <|endoftext|>; default: the model's own samples"
    )
    evaluate.add_argument("--start", type=float, default=0.0, help="skip this share of the texts (0.95: the last 5 %%)")
    evaluate.add_argument("--ratios", default="0.1,0.2,0.3,0.4", help="pruning ratios (%(default)s)")
    evaluate.add_argument("--methods", help="separated by semicolons; default: all")
    evaluate.add_argument("--context", type=int, default=96, help="tokens read as prompt (%(default)s)")
    evaluate.add_argument("--continuation", type=int, default=96, help="tokens decoded, at most (%(default)s)")
    evaluate.add_argument("--texts-per-subset", type=int, default=30, help="(%(default)s)")
    evaluate.add_argument("--subsets", type=int, default=3, help="disjoint subsets, for the spread (%(default)s)")
    evaluate.add_argument("--json", type=Path, help="also write the rows here")
    evaluate.set_defaults(run=run_eval)

    demo = commands.add_parser("demo", help="the bundled model, dense and pruned by 20 %% and 40 %%")
    demo.add_argument("--max-new-tokens", type=int, default=100)
    demo.set_defaults(run=run_demo)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="zoo:stories", help="folder, hub id, or zoo:NAME (%(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on CPU, else bfloat16")
    parser.add_argument("--device", help="cuda where there is one, else cpu")


def _add_config(parser: argparse.ArgumentParser, ratio: bool = True) -> None:
    defaults = PopConfig()
    if ratio:
        either = parser.add_mutually_exclusive_group()
        either.add_argument("--pruning-ratio", type=float, help=f"share of block weights ({defaults.pruning_ratio})")
        either.add_argument("--ffn-ratio", type=float, help="share of FFN channels, instead")
        parser.add_argument("--selection", default=defaults.selection, help="mask or keep (%(default)s)")
    parser.add_argument("--candidate-fraction", type=float, default=defaults.candidate_fraction, help="(%(default)s)")
    parser.add_argument("--importance", default=defaults.importance, help="wanda, griffin, flock (%(default)s)")
    parser.add_argument("--prior-tokens", type=float, default=defaults.prior_tokens, help="experts: n0 (%(default)s)")
    parser.add_argument("--fill", default=defaults.fill, help="zero or mean (%(default)s)")
    parser.add_argument("--prefill", default=defaults.prefill, help="dense or pruned (%(default)s)")


def _add_generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", default=DEMO_PROMPT)
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the tokenizer's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def config_from(args: argparse.Namespace) -> PopConfig:
    names = ("pruning_ratio", "ffn_ratio", "selection", "candidate_fraction", "importance", "fill", "prefill")
    names += ("prior_tokens",)
    return PopConfig(**{name: getattr(args, name) for name in names if hasattr(args, name)})


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


def run_generate(args: argparse.Namespace) -> None:
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


def _label(config: PopConfig) -> str:
    if config.ffn_ratio is not None:
        return f"{config.selection}, {config.ffn_ratio:.0%} of channels pruned"
    return f"{config.selection}, {config.pruning_ratio:.0%} pruned"


def run_inspect(args: argparse.Namespace) -> None:
    from popmm.attach import pruned
    from popmm.loading import encode
    from popmm.plots import experts_figure, regions_figure

    config, settings = config_from(args), generation_settings(args)
    if not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {args.out.parent}")
    model, tokenizer = load_from(args)
    inputs = encode(tokenizer, args.prompt, model.device, args.chat)
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


def run_eval(args: argparse.Namespace) -> None:
    from popmm.evaluate import evaluate, methods_for, rows_to_json, rows_to_markdown, subsets_of_text

    model, tokenizer = load_from(args)
    methods = args.methods.split(";") if args.methods else methods_for(model)
    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    subsets = subsets_of_text(model, tokenizer, args)
    rows = evaluate(model, subsets, methods, ratios, config_from(args), args.context)
    print(rows_to_markdown(rows))
    if args.json:
        args.json.write_text(rows_to_json(rows, args) + "\n")


def run_demo(args: argparse.Namespace) -> None:
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


def main(argv: list[str] | None = None) -> int:
    """Runs a command; bad input ends in one line and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"popmm {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

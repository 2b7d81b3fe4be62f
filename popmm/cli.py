"""Command line: popmm generate | chat | inspect | eval | demo."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from rich.console import Console

from popmm.config import PopConfig

CHAT_EPILOG = "Inside: /image PATH, /ratio 0.3, /stats, /reset, /help, /quit."
PICTURE_PROMPT = "What is in the picture?"
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

    chat = commands.add_parser("chat", help="chat about text and pictures, pruned", epilog=CHAT_EPILOG)
    _add_model(chat, default="zoo:shapes")
    _add_config(chat)
    _add_generation(chat, prompt=False)
    chat.add_argument("--image", action="append", default=[], help="picture for the first question; may be repeated")
    chat.set_defaults(run=run_chat)

    inspect = commands.add_parser("inspect", help="show a prompt's partition as a table and a picture")
    _add_model(inspect)
    _add_config(inspect)
    _add_generation(inspect)
    inspect.add_argument("--second-prompt", default=SECOND_PROMPT, help="experts: compared with the first")
    inspect.add_argument("--image", action="append", help="picture for a vision-language model; may be repeated")
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
    evaluate.add_argument("--ffn-ratios", help="FFN ratios, in place of pruning ratios")
    evaluate.add_argument("--methods", help="separated by semicolons; default: all")
    evaluate.add_argument("--context", type=int, default=96, help="tokens read as prompt (%(default)s)")
    evaluate.add_argument("--continuation", type=int, default=96, help="tokens decoded, at most (%(default)s)")
    evaluate.add_argument("--texts-per-subset", type=int, default=30, help="(%(default)s)")
    evaluate.add_argument("--subsets", type=int, default=3, help="disjoint subsets, for the spread (%(default)s)")
    evaluate.add_argument("--task", choices=["text", "shapes"], default="text", help="shapes: answers about pictures")
    evaluate.add_argument("--pictures", type=int, default=60, help="shapes: pictures per seed (%(default)s)")
    evaluate.add_argument("--seeds", type=int, default=3, help="shapes: sets of pictures (%(default)s)")
    evaluate.add_argument("--json", type=Path, help="also write the rows here")
    evaluate.set_defaults(run=run_eval)

    bench = commands.add_parser("bench", help="decode speed, dense and pruned, against the bytes read")
    bench.add_argument("--shape", help="random weights at the sizes of a known model; a wrong name lists them")
    bench.add_argument("--model", help="folder, hub id, or zoo:NAME, in place of --shape")
    bench.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on CPU, else bfloat16")
    bench.add_argument("--device", help="cuda where there is one, else cpu")
    bench.add_argument("--layers", type=int, help="fewer layers than the shape has")
    bench.add_argument("--tiny", action="store_true", help="a sixteenth of every width, two layers: a dry run")
    bench.add_argument("--batch", type=int, default=1, help="(%(default)s)")
    bench.add_argument("--prompt-tokens", type=int, default=128, help="(%(default)s)")
    bench.add_argument("--new-tokens", type=int, default=128, help="(%(default)s)")
    bench.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    bench.add_argument("--selections", default="mask,keep,gate", help="gate8, gate4: quantised gate rows (%(default)s)")
    bench.add_argument("--ratios", default="0.2,0.4", help="pruning ratios (%(default)s)")
    bench.add_argument("--layouts", default="auto", help="auto,copy,permute (%(default)s)")
    yes_or_no = argparse.BooleanOptionalAction
    bench.add_argument("--compiled", action=yes_or_no, help="torch.compile with static caches (on CUDA only)")
    bench.add_argument("--json", type=Path, help="also write the rows here")
    bench.add_argument("--plot", type=Path, help="also draw speed-up against bytes here")
    bench.set_defaults(run=run_bench)

    demo = commands.add_parser("demo", help="the bundled model, dense and pruned by 20 %% and 40 %%")
    demo.add_argument("--max-new-tokens", type=int, default=100)
    demo.set_defaults(run=run_demo)
    return parser


def _add_model(parser: argparse.ArgumentParser, default: str = "zoo:stories") -> None:
    parser.add_argument("--model", default=default, help="folder, hub id, or zoo:NAME (%(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on CPU, else bfloat16")
    parser.add_argument("--device", help="cuda where there is one, else cpu")


def _add_config(parser: argparse.ArgumentParser, ratio: bool = True) -> None:
    defaults = PopConfig()
    if ratio:
        either = parser.add_mutually_exclusive_group()
        either.add_argument("--pruning-ratio", type=float, help=f"share of block weights ({defaults.pruning_ratio})")
        either.add_argument("--ffn-ratio", type=float, help="share of FFN channels, instead")
        parser.add_argument("--gate-bits", type=int, default=defaults.gate_bits, help="gate: 16, 8 or 4 (%(default)s)")
        parser.add_argument("--selection", default=defaults.selection, help="mask, keep or gate (%(default)s)")
    parser.add_argument("--layout", default=defaults.layout, help="auto, copy or permute (%(default)s)")
    parser.add_argument("--candidate-fraction", type=float, help=f"gamma ({defaults.candidate_fraction})")
    parser.add_argument("--importance", default=defaults.importance, help="wanda, griffin, flock (%(default)s)")
    parser.add_argument("--prior-tokens", type=float, default=defaults.prior_tokens, help="experts: n0 (%(default)s)")
    parser.add_argument("--modality-balance", type=float, help="share of the weight that text tokens get (none)")
    parser.add_argument("--vision", default=defaults.vision, help="vision tower: dense or prune (%(default)s)")
    parser.add_argument("--fill", default=defaults.fill, help="zero or mean (%(default)s)")
    parser.add_argument("--prefill", default=defaults.prefill, help="dense or pruned (%(default)s)")


def _add_generation(parser: argparse.ArgumentParser, prompt: bool = True) -> None:
    if prompt:
        parser.add_argument("--prompt", default=DEMO_PROMPT)
        parser.add_argument("--chat", action="store_true", help="wrap the prompt in the tokenizer's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def config_from(args: argparse.Namespace) -> PopConfig:
    names = ("pruning_ratio", "ffn_ratio", "selection", "candidate_fraction", "importance", "fill", "prefill")
    names += ("prior_tokens", "modality_balance", "vision", "gate_bits", "layout")
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


def run_chat(args: argparse.Namespace) -> None:
    from popmm import zoo
    from popmm.chat import chat

    config, settings = config_from(args), generation_settings(args)
    model, processor = load_from(args)
    sources = args.image or ([str(zoo.picture())] if args.model == "zoo:shapes" else [])
    torch.manual_seed(args.seed)
    chat(model, processor, config, sources, **settings)


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
    if args.image:
        return inspect_pictures(args, config)
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


def inspect_pictures(args: argparse.Namespace, config: PopConfig) -> None:
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


def run_eval(args: argparse.Namespace) -> None:
    from popmm.evaluate import evaluate, methods_for, rows_to_json, rows_to_markdown, subsets_of_text

    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    if args.task == "shapes":
        return run_eval_shapes(args, ratios)
    model, tokenizer = load_from(args)
    methods = args.methods.split(";") if args.methods else methods_for(model)
    subsets = subsets_of_text(model, tokenizer, args)
    of = "pruning_ratio"
    if args.ffn_ratios:
        of, ratios = "ffn_ratio", [float(ratio) for ratio in args.ffn_ratios.split(",")]
    rows = evaluate(model, subsets, methods, ratios, config_from(args), args.context, of)
    print(rows_to_markdown(rows))
    if args.json:
        args.json.write_text(rows_to_json(rows, args) + "\n")


def run_eval_shapes(args: argparse.Namespace, ratios: list[float]) -> None:
    from popmm.answers import METHODS, answers_to_markdown, evaluate_answers
    from popmm.evaluate import rows_to_json

    if args.pictures < 1 or args.seeds < 1:
        raise ValueError(f"--pictures {args.pictures} --seeds {args.seeds}: give 1 or more of each")
    model, processor = load_from(args)
    methods = args.methods.split(";") if args.methods else list(METHODS)
    rows = evaluate_answers(model, processor, methods, ratios, config_from(args), args.pictures, args.seeds)
    print(answers_to_markdown(rows))
    print(f"\nExact answers in percent, {args.pictures} pictures per seed, {args.seeds} seeds; ± is their spread.")
    if args.json:
        args.json.write_text(rows_to_json(rows, args) + "\n")


def run_bench(args: argparse.Namespace) -> None:
    from popmm.bench import Bench, bench_table, machine, save_json, ways
    from popmm.loading import DTYPES, load_model
    from popmm.plots import bench_figure
    from popmm.shapes import random_model, shape_config

    if (args.shape is None) == (args.model is None):
        raise ValueError("give either --shape, such as llama-3.1-8b, or --model")
    for name in ("batch", "prompt_tokens", "new_tokens", "rounds"):
        if getattr(args, name) < (8 if name == "new_tokens" else 1):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is too few")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.model is not None:
        model, _ = load_model(args.model, args.dtype, device)
    else:
        dtype = DTYPES[args.dtype or ("float32" if device == "cpu" else "bfloat16")]
        model = random_model(shape_config(args.shape, args.layers, args.tiny), dtype, device)
    compiled = args.compiled if args.compiled is not None else device != "cpu"
    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    rows = ways(model, args.selections.split(","), ratios, args.layouts.split(","), compiled)
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

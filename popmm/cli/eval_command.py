"""``popmm eval``: quality at equal bytes or ratios, answers about pictures, tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from popmm.cli.arguments import RATIOS, batches, check_folders, check_pictures, config_from, listed, numbers
from popmm.cli.commands import load_from
from popmm.config import PopConfig
from popmm.evaluation.presets import preset

if TYPE_CHECKING:
    from popmm.evaluation.evaluate import Case

PICTURES = (".png", ".pdf", ".svg", ".jpg")
GAMMAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)


def run(args: argparse.Namespace) -> None:
    """Checks the arguments and runs what they ask for."""
    check_folders(args.json)
    check_pictures(args.plot)
    for name in ("context", "continuation", "texts_per_subset", "subsets", "pictures", "seeds", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more")
    if args.calibration < 0:
        raise ValueError(f"--calibration {args.calibration}: give 0 or more")
    _check(args)
    files = task_files(args.task_file or [])
    if args.tasks or args.preset:
        return _evaluate_tasks(args, files)
    model, tokenizer = load_from(args)
    if args.paper:
        from popmm.cli.eval_paper import evaluate_paper

        return evaluate_paper(args, model, tokenizer, files)
    if args.task == "shapes" and not args.bytes and not args.ffn_ratios:
        _evaluate_answers(args, model, tokenizer)
    else:
        _evaluate_methods(args, model, tokenizer)


def task_files(given: list[str]) -> dict[str, Path]:
    """The local files of tasks, by name.

    Raises:
        ValueError: not ``NAME=FILE``, or no such file.
    """
    found = {}
    for text in given:
        name, _, file = text.partition("=")
        if not name or not file:
            raise ValueError(f"--task-file {text}: give NAME=FILE, such as hellaswag=hellaswag_val.jsonl")
        found[name] = Path(file)
        if not found[name].is_file():
            raise ValueError(f"--task-file {text}: there is no such file")
    return found


def dtype_of(model) -> str:
    return str(model.dtype).removeprefix("torch.")


def _save(args: argparse.Namespace, rows: list) -> None:
    if args.json:
        from popmm.evaluation.tables import rows_to_json

        args.json.write_text(rows_to_json(rows, args) + "\n")


def _check(args: argparse.Namespace) -> None:
    """Refuses what would be found out late, or left out without a word."""
    tasks, by_hand = args.tasks or args.preset, args.selection or args.gate_bits or args.weight_bits
    by_statistics = args.task == "shapes" and not args.bytes and not args.ffn_ratios and not tasks
    together = {
        "--preset with --tasks": args.preset and args.tasks,
        "--preset, the paper's own, with other settings": args.preset and config_from(args) != PopConfig(),
        "--plot with --tasks or --preset": tasks and args.plot,
        "--ffn-ratios with --tasks or --preset": tasks and args.ffn_ratios,
        "--bytes or --methods with --preset": args.preset and (args.bytes or args.methods),
        "--methods with --tasks, which needs --bytes": args.tasks and args.methods and not args.bytes,
        "--paper, which is settled, with other tasks, methods, shares or settings": args.paper
        and (
            tasks
            or args.bytes
            or args.ffn_ratios
            or args.methods
            or args.sweep
            or args.batch
            or args.plot
            or args.task != "text"
            or args.ratios != RATIOS
            or config_from(args) != PopConfig()
        ),
        "--sweep with --tasks, --preset or --task shapes": args.sweep and (tasks or args.task == "shapes"),
        "--sweep, which is of mask, with --bytes, --ffn-ratios, --methods or --candidate-fraction": args.sweep
        and (args.bytes or args.ffn_ratios or args.methods or args.candidate_fraction is not None),
        "--limit, --include-path, --task-file or --run-code without --tasks, --preset or --paper": not tasks
        and not args.paper
        and (args.limit or args.include_path or args.run_code or args.task_file),
        "--batch with --task shapes or --sweep": args.batch and (args.task == "shapes" or args.sweep),
        "several numbers of --batch with --tasks or --preset": tasks and args.batch and "," in args.batch,
        "--preset, which has its own, with --ratios": args.preset and args.ratios != RATIOS,
        "--bytes with --ffn-ratios": args.bytes and args.ffn_ratios,
        "--plot with --task shapes, which needs --bytes": by_statistics and args.plot,
        "--selection, --gate-bits or --weight-bits with methods, which set them": by_hand
        and not (tasks or by_statistics),
    }
    for words, given in together.items():
        if given:
            raise ValueError(f"{words} does not go: leave one out")
    for ratio in numbers(args.ffn_ratios or args.ratios):
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio {ratio}: give numbers from 0 to below 1, such as 0.2,0.4")
    for share in numbers(args.bytes or "1"):
        if not 0 < share <= 1:
            raise ValueError(f"--bytes {share}: give shares between 0 and 1, such as 0.7,0.5")
    batches(args.batch)
    if args.text and not args.text.is_file():
        raise ValueError(f"--text {args.text}: there is no such file")
    if args.preset:
        preset(args.preset)
    if args.methods and not by_statistics:
        from popmm.evaluation.methods import METHODS, check_known

        check_known(listed(args.methods, METHODS))


def _evaluate_tasks(args: argparse.Namespace, files: dict[str, Path]) -> None:
    from popmm.evaluation.tasks import at_bytes, at_ratios, evaluate_tasks, tasks_to_markdown

    model, tokenizer = load_from(args)
    batch = batches(args.batch)[0]
    if args.preset:
        how = preset(args.preset)
        tasks = list(how.tasks)
        settings = at_ratios(how.config, list(how.ratios), how.scoring, batch if args.batch else how.batch)
    else:
        tasks = listed(args.tasks)
        if args.bytes:
            from popmm.evaluation.methods import METHODS

            names = listed(args.methods or "tiers", METHODS)
            settings = at_bytes(model, config_from(args), numbers(args.bytes), names, batch)
        else:
            settings = at_ratios(config_from(args), numbers(args.ratios), batch=batch)
    rows = evaluate_tasks(model, tokenizer, tasks, settings, args.limit, args.include_path, args.run_code, files)
    print(tasks_to_markdown(rows))
    _save(args, rows)


def _evaluate_methods(args: argparse.Namespace, model, tokenizer) -> None:
    from popmm.evaluation.evaluate import Wanted, evaluate, with_greedy
    from popmm.evaluation.methods import METHODS, methods_for
    from popmm.evaluation.quality_plots import equal_bytes_figure
    from popmm.evaluation.tables import model_name, rows_to_markdown
    from popmm.evaluation.texts import text_cases
    from popmm.zoo.encoding import check_length

    exact, dtype = args.task == "shapes", dtype_of(model)
    if exact:
        subsets, calibration = _picture_cases(args, model, tokenizer)
    else:
        check_length(model, args.context, args.continuation)
        subsets, calibration = text_cases(
            model,
            tokenizer,
            args.text,
            args.start,
            args.context,
            args.continuation,
            args.subsets,
            args.texts_per_subset,
            args.calibration,
        )
        subsets = [with_greedy(model, cases, args.continuation) for cases in subsets]
    base = config_from(args)
    if args.sweep:
        return _sweep_gamma(args, model, subsets, base)
    names = listed(args.methods, METHODS) if args.methods else methods_for(model)
    if not calibration and not args.methods:
        left_out = [name for name in names if METHODS[name].calibrated]
        print(f"without {', '.join(left_out)}: no texts are left to calibrate on", file=sys.stderr)
        names = [name for name in names if name not in left_out]
    fixed = [name for name in names if METHODS[name].fixed]
    names = [name for name in names if name not in fixed]
    if args.bytes:
        wanted = [Wanted(name, bytes_share=share) for share in numbers(args.bytes) for name in names]
    elif args.ffn_ratios:
        wanted = [Wanted(name, ffn_ratio=ratio) for ratio in numbers(args.ffn_ratios) for name in names]
    else:
        wanted = [Wanted(name, pruning_ratio=ratio) for ratio in numbers(args.ratios) for name in names]
    together = [replace(w, batch=n) for w in wanted for n in batches(args.batch)]
    rows = evaluate(model, subsets, together + [Wanted(name) for name in fixed], base, calibration)
    print(rows_to_markdown(rows, exact), f"Weights: {dtype}.")
    measured = {(row.method, row.bytes_wanted) for row in rows}
    for w in wanted:
        if w.bytes_share is not None and (w.method, w.bytes_share) not in measured:
            print(f"left out: {w.method} cannot read as little as {w.bytes_share:.0%}")
    _save(args, rows)
    if args.plot:
        title = f"{model_name(args.model)}, {dtype}"
        equal_bytes_figure(rows, title, args.plot, exact)


def _sweep_gamma(args: argparse.Namespace, model, subsets: list[list[Case]], base: PopConfig) -> None:
    from popmm.evaluation.evaluate import Row, Wanted, evaluate
    from popmm.evaluation.quality_plots import gamma_figure
    from popmm.evaluation.tables import model_name, rows_to_markdown

    rows: list[Row] = []
    for gamma in GAMMAS:
        own = base.replace(selection="mask", candidate_fraction=gamma)
        found = evaluate(model, subsets, [Wanted("mask", pruning_ratio=r) for r in numbers(args.ratios)], own)
        rows += ([] if rows else found[:1]) + [replace(row, method=f"mask, gamma {gamma}") for row in found[1:]]
    print(rows_to_markdown(rows), f"Weights: {dtype_of(model)}. Where the band would reach past the ends it is cut.")
    _save(args, rows)
    if args.plot:
        gamma_figure(rows, f"mask on {model_name(args.model)}", args.plot)


def _picture_cases(args: argparse.Namespace, model, processor) -> tuple[list, list]:
    from popmm.evaluation.answers import held_out_questions
    from popmm.evaluation.evaluate import Case

    sets = [
        [Case(q.inputs, q.answer) for q in held_out_questions(processor, model.device, seed, args.pictures)]
        for seed in range(args.seeds + 1)
    ]
    return sets[:-1], sets[-1][: args.calibration]


def _evaluate_answers(args: argparse.Namespace, model, processor) -> None:
    from popmm.evaluation.answers import METHODS, answers_to_markdown, evaluate_answers

    methods = listed(args.methods, METHODS) if args.methods else list(METHODS)
    base = config_from(args)
    if args.selection is None:  # gate reads all channels' gates, whatever ranked them
        base = base.replace(selection="mask")
    rows = evaluate_answers(model, processor, methods, numbers(args.ratios), base, args.pictures, args.seeds)
    print(answers_to_markdown(rows))
    print(f"\nExact answers in percent, {args.pictures} pictures per seed, {args.seeds} seeds; ± is their spread.")
    _save(args, rows)

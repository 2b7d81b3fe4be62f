"""``popmm eval --paper``: the paper's tables on one model, as far as data is given."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

NAMES = {"paper-qa": "Question answering, accuracy", "paper-generation": "Generation tasks"}


def evaluate_paper(args: argparse.Namespace, model, tokenizer, files: dict[str, Path]) -> None:
    """Prints every table, or one line that says what it needs."""
    from popmm.evaluation.paper import ELSEWHERE, given_and_missing, ratio_rows, settings_for
    from popmm.evaluation.tables import described, to_json
    from popmm.evaluation.tasks import evaluate_tasks, tasks_to_markdown

    found: dict[str, list[Any]] = {"ratios": ratio_rows(model)}
    print("## Ratio of the FFNs (table 8)")
    for row in found["ratios"]:
        print(f"{row.pruning_ratio:.0%} of the blocks' weights: {row.ffn_ratio:.1%} of the FFNs' channels")
    for preset, name in NAMES.items():
        print(f"\n## {name}")
        given, missing = given_and_missing(preset, files)
        if given:
            found[preset] = evaluate_tasks(
                model,
                tokenizer,
                given,
                settings_for(preset),
                args.limit,
                args.include_path,
                args.run_code,
                {task: files[task] for task in given},
            )
            print(tasks_to_markdown(found[preset]))
        if missing:
            print(
                f"not run, for want of data: {', '.join(missing)}. Give --task-file NAME=FILE, or --preset {preset} "
                "where the harness can fetch it"
            )
    found |= _on_texts(args, model, tokenizer)
    print()
    for name, how in ELSEWHERE:
        print(f"not part of this command: {name}: {how}")
    if args.json:
        tables = {name: [asdict(row) for row in rows] for name, rows in found.items()}
        args.json.write_text(to_json(described(args) | {"tables": tables}) + "\n")


def _on_texts(args: argparse.Namespace, model, tokenizer) -> dict[str, list[Any]]:
    """Perplexity and masks, which need a text."""
    print("\n## Perplexity, one pass")
    if not args.text:
        print("not run, for want of data: give --text FILE (the paper: WikiText-2)")
        print("\n## Which mask, and how wide the band\nnot run, for want of data: give --text FILE")
        return {}
    from popmm.evaluation.paper import mask_rows, pass_rows
    from popmm.evaluation.tables import rows_to_markdown
    from popmm.evaluation.texts import text_cases
    from popmm.zoo.encoding import check_length

    check_length(model, args.context, args.continuation)
    how = (args.start, args.context, args.continuation, args.subsets, args.texts_per_subset, 0)
    subsets, _ = text_cases(model, tokenizer, args.text, *how)
    passes = pass_rows(model, [case for cases in subsets for case in cases])
    print("| method | pruned | perplexity |\n|---|---|---|")
    for row in passes:
        print(f"| {row.method} | {row.pruning_ratio:.0%} | {row.perplexity:.3f} |")
    print(f"\n{passes[0].tokens} tokens in texts of at most {args.context + args.continuation}.")
    print(f"\n## Which mask, and how wide the band: {args.context} tokens of prompt, the rest decoded")
    masks = mask_rows(model, subsets)
    print(rows_to_markdown(masks))
    return {"perplexity": passes, "masks": masks}

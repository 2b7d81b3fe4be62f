"""The paper's protocol in one command, and tasks of lm-evaluation-harness on a loaded model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from popmm.config import PopConfig

UNSAFE = ("mbpp", "humaneval")  # run the code that the model writes


@dataclass(frozen=True)
class Preset:
    """Tasks as the paper ran them (section 4): both ratios, ten prompts that share a partition."""

    tasks: tuple[str, ...]
    scoring: str = "prompt"
    batch: int = 10
    ratios: tuple[float, ...] = (0.2, 0.4)
    config: PopConfig = field(default_factory=PopConfig.paper)


PRESETS = {
    "paper-qa": Preset(("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")),
    "paper-generation": Preset(("coqa", "mbpp", "humaneval", "nq_open", "gsm8k")),
    "paper-wikitext": Preset(("wikitext",)),
}


@dataclass
class TaskRow:
    """A task's metrics at one pruning ratio."""

    task: str
    pruning_ratio: float
    bytes_share: float
    metrics: dict[str, float]
    skipped: float = 0.0  # share of a token's FFN channels that are not computed


def preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: give one of {', '.join(PRESETS)}")
    return PRESETS[name]


def evaluate_tasks(
    model,
    tokenizer,
    tasks: list[str],
    ratios: list[float],
    base: PopConfig,
    scoring: str = "decode",
    batch: int = 1,
    limit: int | None = None,
    include_path: Path | None = None,
    run_code: bool = False,
) -> list[TaskRow]:
    """Rows of every task and ratio, the dense model first.

    Args:
        model: a loaded model, not attached.
        base: settings; its ratio gives way to each of ``ratios``.
        scoring, batch: see ``popmm.evaluation.harness.PopLM``.
        limit: so many items of each task; None = all.
        include_path: folder of further task files.
        run_code: whether tasks may run the code that the model writes.

    Raises:
        RuntimeError: lm-eval is not installed.
        ValueError: unknown tasks, or ones that run code, unless allowed to.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RuntimeError("tasks need lm-evaluation-harness: pip install 'popmm[eval]'") from error
    from popmm.evaluation.harness import PopLM

    unsafe = [task for task in tasks if task.startswith(UNSAFE)]
    if unsafe and not run_code:
        raise ValueError(f"{', '.join(unsafe)}: these tasks run code that the model writes; allow it with --run-code")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}: 'lm_eval ls tasks' lists them, --include-path adds your own")
    rows = []
    for ratio in [0.0, *ratios]:
        config = base.replace(pruning_ratio=ratio)
        settings: dict[str, Any] = {name: getattr(config, name) for name in config.__dataclass_fields__}
        lm = PopLM(model, tokenizer=tokenizer, scoring=scoring, batch_size=batch, **settings)
        try:
            results = lm_eval.simple_evaluate(
                lm,
                tasks=tasks,
                limit=limit,
                task_manager=manager,
                confirm_run_unsafe_code=run_code,
                bootstrap_iters=1000,
            )["results"]
            (pruned, dense), skipped = lm.state.bytes_per_token(), lm.state.channels_skipped()
        finally:
            lm.detach()
        for task, metrics in results.items():
            numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and k != "sample_len"}
            rows.append(TaskRow(task, ratio, pruned / dense, numbers, skipped))
    return rows


def tasks_to_markdown(rows: list[TaskRow]) -> str:
    """Rows as a Markdown table, a line per task and metric, a column per ratio."""
    ratios = list(dict.fromkeys(row.pruning_ratio for row in rows))
    costs = {r.pruning_ratio: f"{r.bytes_share:.0%} of FFN bytes, {r.skipped:.0%} of channels skipped" for r in rows}
    heads = ["dense" if ratio == 0 else f"{ratio:.0%} pruned ({costs[ratio]})" for ratio in ratios]
    lines = [f"| task | metric | {' | '.join(heads)} |", "|" + "---|" * (2 + len(heads))]
    for task in dict.fromkeys(row.task for row in rows):
        own = {row.pruning_ratio: row.metrics for row in rows if row.task == task}
        for metric in own[ratios[0]]:
            if "_stderr" in metric:
                continue
            name, _, filtered = metric.partition(",")
            error = f"{name}_stderr,{filtered}"
            cells = []
            for ratio in ratios:
                spread = own[ratio].get(error)
                cells.append(f"{own[ratio][metric]:.4f}" + (f" ± {spread:.4f}" if isinstance(spread, float) else ""))
            label = name if filtered in ("", "none") else f"{name} ({filtered})"
            lines.append(f"| {task} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)

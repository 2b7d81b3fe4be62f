"""Tasks of lm-evaluation-harness on a loaded model, dense and in several settings, from the hub or from local files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from popmm.config import PopConfig
from popmm.evaluation.methods import METHODS, check_known, fit, quantised_ffns, share_read

UNSAFE = ("mbpp", "humaneval")  # run the code that the model writes
SAME = "same_answers,none"  # share of items answered as the dense model answers them


@dataclass(frozen=True)
class Setting:
    """One way to run tasks: a column of the table."""

    name: str
    config: PopConfig
    scoring: str = "decode"  # see ``popmm.evaluation.harness.PopLM``
    batch: int = 1
    weight_bits: int | None = None  # all FFN weights rounded to so many bits, nothing pruned


@dataclass
class TaskRow:
    """A task's metrics in one setting."""

    task: str
    setting: str
    pruning_ratio: float | None
    bytes_share: float
    metrics: dict[str, float]
    skipped: float = 0.0  # share of a token's FFN channels that are not computed


def at_ratios(base: PopConfig, ratios: list[float], scoring: str = "decode", batch: int = 1) -> list[Setting]:
    """Dense, and the same settings at every pruning ratio."""
    return [
        Setting(f"{ratio:.0%} pruned" if ratio else "dense", base.replace(pruning_ratio=ratio), scoring, batch)
        for ratio in [0.0, *ratios]
    ]


def at_bytes(model, base: PopConfig, shares: list[float], methods: list[str], batch: int = 1) -> list[Setting]:
    """Dense, every method at every share of the 16-bit bytes that it can keep to, and plain quantisers once.

    Raises:
        ValueError: an unknown method, or one that replaces parts of the library or calibrates on texts.
    """
    check_known(methods)
    for name in methods:
        if METHODS[name].prepare or METHODS[name].sizes is not METHODS["mask"].sizes:
            raise ValueError(f"{name}: tasks run without it; popmm eval --text compares it with the others")
    found = at_ratios(base, [], batch=batch)
    for name in (name for name in methods if not METHODS[name].fixed):
        for share in shares:
            ratio = fit(model, METHODS[name], base, share)
            if ratio is not None:
                config = METHODS[name].config(base.replace(ffn_ratio=ratio))
                found.append(Setting(f"{name}, {share:.0%} of bytes", config, batch=batch))
    for name in (name for name in methods if METHODS[name].fixed):
        bits = METHODS[name].weight_bits
        config = base.replace(pruning_ratio=0.0) if bits else METHODS[name].config(base.replace(ffn_ratio=0.5))
        found.append(Setting(name, config, batch=batch, weight_bits=bits))
    return found


def evaluate_tasks(
    model,
    tokenizer,
    tasks: list[str],
    settings: list[Setting],
    limit: int | None = None,
    include_path: Path | None = None,
    run_code: bool = False,
    files: dict[str, Path] | None = None,
) -> list[TaskRow]:
    """Rows of every task and setting. With the first setting's answers those of the others are compared.

    Args:
        model: a loaded model, not attached.
        limit: so many items of each task; None = all.
        include_path: folder of further task files.
        run_code: whether tasks may run the code that the model writes.
        files: tasks whose items come from a local file (JSON lines), in place of the hub.

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
    unknown = [task for task in (*tasks, *(files or {})) if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}: 'lm_eval ls tasks' lists them, --include-path adds your own")
    rows: list[TaskRow] = []
    first: dict[str, dict] = {}
    with _from_files(manager, tasks, files or {}) as specs:
        for setting in settings:
            config = setting.config
            fields: dict[str, Any] = {name: getattr(config, name) for name in config.__dataclass_fields__}
            with ExitStack() as stack:
                rounded = None
                if setting.weight_bits is not None:
                    rounded = stack.enter_context(quantised_ffns(model, setting.weight_bits))
                lm = PopLM(model, tokenizer=tokenizer, scoring=setting.scoring, batch_size=setting.batch, **fields)
                stack.callback(lm.detach)
                found = lm_eval.simple_evaluate(
                    lm,
                    tasks=specs,
                    limit=limit,
                    task_manager=manager,
                    confirm_run_unsafe_code=run_code,
                    bootstrap_iters=1000,
                    log_samples=True,
                )
                share = share_read(lm.state, setting.batch) if rounded is None else rounded
                skipped = lm.state.channels_skipped(setting.batch)
            for task, metrics in found["results"].items():
                kept = {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float)) and k != "sample_len"}
                answers = _answers(found["samples"].get(task, []))
                same = [answers[i] == answer for i, answer in first.setdefault(task, answers).items()]
                if same:
                    kept[SAME] = sum(same) / len(same)
                rows.append(TaskRow(task, setting.name, config.pruning_ratio, share, kept, skipped))
    return rows


@contextmanager
def _from_files(manager, tasks: list[str], files: dict[str, Path]) -> Iterator[list[str]]:
    """The tasks as the harness takes them: names, and files that include a task and change where its items come from.

    Examples in the prompt come from the same file then, other items than the one that is asked.
    """
    with tempfile.TemporaryDirectory() as folder:
        specs = []
        for task in tasks:
            if task not in files:
                specs.append(task)
                continue
            own = {
                "include": str(manager.task_index[task].yaml_path),
                "task": task,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {"test": str(files[task].resolve())}},
                "training_split": None,
                "validation_split": None,
                "test_split": "test",
                "fewshot_split": "test",
            }
            place = Path(folder) / f"{task}.yaml"
            place.write_text(json.dumps(own))  # JSON is YAML
            specs.append(str(place))
        yield specs


def _answers(samples: list[dict]) -> dict[int, Any]:
    """By item: the text that was generated, or the choice of the greatest likelihood; of whole texts scored, none."""
    found = {}
    for sample in samples:
        given = [response[0] for response in sample["resps"]]
        if all(isinstance(text, str) for text in given):
            found[sample["doc_id"]] = tuple(given)
        elif len(given) > 1 and all(isinstance(score, (tuple, list)) for score in given):
            likelihoods = [score[0] for score in given]
            found[sample["doc_id"]] = likelihoods.index(max(likelihoods))
    return found


def tasks_to_markdown(rows: list[TaskRow]) -> str:
    """Rows as a Markdown table, a line per task and metric, a column per setting."""
    names = list(dict.fromkeys(row.setting for row in rows))
    costs = {r.setting: f"{r.bytes_share:.0%} of FFN bytes, {r.skipped:.0%} of channels skipped" for r in rows}
    heads = [name if name == "dense" else f"{name} ({costs[name]})" for name in names]
    lines = [f"| task | metric | {' | '.join(heads)} |", "|" + "---|" * (2 + len(heads))]
    for task in dict.fromkeys(row.task for row in rows):
        own = {row.setting: row.metrics for row in rows if row.task == task}
        for metric in own[names[0]]:
            if "_stderr" in metric:
                continue
            name, _, filtered = metric.partition(",")
            error = f"{name}_stderr,{filtered}"
            cells = []
            for setting in names:
                spread = own[setting].get(error)
                cells.append(f"{own[setting][metric]:.4f}" + (f" ± {spread:.4f}" if spread is not None else ""))
            label = name if filtered in ("", "none") else f"{name} ({filtered})"
            lines.append(f"| {task} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)

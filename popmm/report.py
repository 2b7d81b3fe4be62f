"""Tables that people read."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Protocol

from rich import box
from rich.console import Console
from rich.table import Table

from popmm.layouts.traffic import channels_computed

if TYPE_CHECKING:
    from popmm.runtime.passes import Passes
    from popmm.runtime.site import PrunedSite

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # of a layer in a module's name


class Summarised(Protocol):
    """What a summary tells of a model: ``PartitionState`` has it."""

    passes: Passes
    ready: bool

    def bytes_per_token(self) -> tuple[int, int]: ...

    def bytes_per_step(self, batch: int) -> tuple[int, int]: ...

    def channels_skipped(self) -> float: ...

    def buffer_bytes(self) -> int: ...

    def freed_bytes(self) -> int: ...

    def notes(self) -> dict[str, str]: ...


def human_bytes(n: float) -> str:
    """``n`` bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def to_text(table: Table, width: int = 120) -> str:
    """A table as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(table)
    return buffer.getvalue().rstrip()


def prompt_tokens(ffns: list[PrunedSite]) -> str:
    """What the partition was made from, such as ``16 image + 21 text tokens``."""
    counts: dict[str, int] = {}
    for ffn in ffns:
        per_token = max(1, ffn.site.top_k)  # experts count a token once for each that reads it
        for name, tokens in ffn.partition.tokens_by_modality.items():
            counts[name] = max(counts.get(name, 0), -(-int(tokens.sum()) // per_token))
    return " + ".join(f"{n} {name}" for name, n in sorted(counts.items())) + " tokens"


def summary_table(state: Summarised, ffns: list[PrunedSite]) -> str:
    """``PartitionState.summary``: a row per distinct FFN, then the total, the passes, the settings and the notes."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("FFN", overflow="fold", min_width=24)
    for column in ("experts", "d_ff", "R", "C", "P", "K", "skipped", "bytes/token", "of dense"):
        table.add_column(column, justify="right")
    rows: dict[tuple[str, ...], list[str]] = {}
    for ffn in ffns:
        rows.setdefault(_row(ffn), []).append(ffn.name)
    for row, names in rows.items():
        table.add_row(shared_name(names), *row)
    pruned, dense = state.bytes_per_token()
    c = ffns[0].config
    importance = c.importance if isinstance(c.importance, str) else "callable"
    status = "waiting for a prompt"
    if state.ready:
        status = "partitioned from " + ("the weights' norms" if c.statistics == "weights" else prompt_tokens(ffns))
    how = f"selection={c.selection}"
    if c.selection == "gate" and not ffns[0].sizes.is_dense:
        most = min(ffn.sizes.read // ffn.sizes.budget for ffn in ffns)
        how += f" gate_bits={c.gate_bits} (batches above {most} read all of C: each token's own rows would be more)"
    if c.selection == "tiers" and not ffns[0].sizes.is_dense:
        parts = [f"{n / ffns[0].sizes.d_ff:.0%} in {bits} bits" for bits, n in ffns[0].sizes.tiers]
        first = "gate row" if ffns[0].sizes.matrices == 3 else "row of the first projection"
        how += f" ({', '.join(parts)}, of each FFN's channels; {ffns[0].sizes.base} bits of every {first}"
        own = "; of experts each token reads its own" if any(ffn.site.is_experts for ffn in ffns) else ""
        together, whole = state.bytes_per_step(2)
        how += f"; the tokens of a batch's step choose together: it reads {together / whole:.1%}{own})"
    if c.rest_bits < 16:
        how += f" rest_bits={c.rest_bits}"
    drafted = "drafted " if c.lossless else ""
    if c.lossless:
        how += " lossless: these are drafts, which the whole model checks"
    if c.refresh_every:
        how += f" refresh_every={c.refresh_every}"
    freed = f", -{human_bytes(state.freed_bytes())} of the model's own" if state.freed_bytes() else ""
    lines = [
        to_text(table),
        f"FFN weights read per {drafted}token at batch 1: {human_bytes(pruned)} of {human_bytes(dense)} "
        f"({pruned / dense:.1%})",
        f"FFN channels skipped per {drafted}token: {state.channels_skipped():.1%}",
        f"passes so far: {state.passes!r}",
        f"{how} importance={importance} fill={c.fill} prefill={c.prefill} "
        f"layout={ffns[0].layout.name}"
        f" (+{human_bytes(state.buffer_bytes())}{freed}); {status}",
    ]
    notes: dict[str, list[str]] = {}
    for name, note in state.notes().items():
        notes.setdefault(note, []).append(name)
    return "\n".join(lines + [f"{shared_name(names)}: {note}" for note, names in notes.items()])


def _row(ffn: PrunedSite) -> tuple[str, ...]:
    s = ffn.sizes
    pruned, dense = ffn.bytes_per_step(), ffn.site.active_bytes()
    sizes = [str(n) for n in (s.d_ff, s.retained, s.candidate, s.pruned, s.budget)]
    experts = f"{ffn.site.top_k} of {ffn.site.n_experts}" if ffn.site.is_experts else "-"
    skipped = 1 - channels_computed(ffn.site, s, ffn.config) / ffn.site.active_channels()
    return (experts, *sizes, f"{skipped:.1%}", human_bytes(pruned), f"{pruned / dense:.1%}")


def shared_name(names: list[str]) -> str:
    """One line for modules whose names differ in numbers alone: ``model.layers.0-29.mlp (30)``."""
    by_form: dict[str, list[list[int]]] = {}
    for name in names:
        by_form.setdefault(_NUMBER.sub("#", name), []).append([int(n) for n in _NUMBER.findall(name)])
    parts = []
    for form, numbers in by_form.items():
        for column in zip(*numbers):
            own = sorted(set(column))
            form = form.replace("#", str(own[0]) if len(own) == 1 else _ranges(own), 1)
        parts.append(form + (f" ({len(numbers)})" if len(numbers) > 1 else ""))
    return ", ".join(parts)


def _ranges(numbers: list[int]) -> str:
    """Rising numbers, such as ``0-3,7``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

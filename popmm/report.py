"""Tables that people read."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from popmm.site import PrunedSite
    from popmm.state import PartitionState


def human_bytes(n: float) -> str:
    """``n`` bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def to_text(table: Table, width: int = 110) -> str:
    """A table as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(table)
    return buffer.getvalue().rstrip()


def prompt_tokens(state: PartitionState) -> str:
    """What the partition was made from, such as ``16 image + 21 text tokens``."""
    counts: dict[str, int] = {}
    for ffn in state._ffns:
        per_token = max(1, ffn.site.top_k)  # experts count a token once for each that reads it
        for name, tokens in ffn.partition.tokens_by_modality.items():
            counts[name] = max(counts.get(name, 0), -(-int(tokens.sum()) // per_token))
    return " + ".join(f"{n} {name}" for name, n in sorted(counts.items())) + " tokens"


def summary_table(state: PartitionState, ffns: list[PrunedSite]) -> str:
    """``PartitionState.summary``: a row per FFN, then the total and the settings."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("FFN")
    for column in ("experts", "d_ff", "R", "C", "P", "K", "bytes/token", "of dense"):
        table.add_column(column, justify="right")
    for ffn in ffns:
        s = ffn.sizes
        pruned, dense = ffn.bytes_per_token()
        sizes = [str(n) for n in (s.d_ff, s.retained, s.candidate, s.pruned, s.budget)]
        experts = f"{ffn.site.top_k} of {ffn.site.n_experts}" if ffn.site.is_experts else "-"
        table.add_row(ffn.name, experts, *sizes, human_bytes(pruned), f"{pruned / dense:.1%}")
    pruned, dense = state.bytes_per_token()
    c = ffns[0].config
    importance = c.importance if isinstance(c.importance, str) else "callable"
    status = f"partitioned from {prompt_tokens(state)}" if state.ready else "waiting for a prompt"
    how = f"selection={c.selection}"
    if c.selection == "gate" and not ffns[0].sizes.is_dense:
        most = min(ffn.sizes.read // ffn.sizes.budget for ffn in ffns)
        how += f" gate_bits={c.gate_bits} (batches above {most} read all of C: each token's own rows would be more)"
    if c.refresh_every:
        how += f" refresh_every={c.refresh_every}"
    lines = [
        to_text(table),
        f"FFN weights read per token at batch 1: {human_bytes(pruned)} of {human_bytes(dense)} ({pruned / dense:.1%})",
        f"{how} importance={importance} fill={c.fill} prefill={c.prefill} "
        f"layout={ffns[0].layout.name}"
        f" (+{human_bytes(state.buffer_bytes())}); {status}",
    ]
    return "\n".join(lines)

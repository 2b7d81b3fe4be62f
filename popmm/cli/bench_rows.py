"""What ``popmm bench`` has measured, as tables and as JSON."""

from __future__ import annotations

import json
import platform
import resource
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich import box
from rich.table import Table


@dataclass
class BenchRow:
    """What one way to decode costs. Times in milliseconds, weight bytes per step at this batch size."""

    row: str
    ms: float  # median per step
    ms_p10: float
    ms_p90: float
    tokens_per_second: float
    ffn_bytes: int
    total_bytes: int
    gb_per_second: float
    of_copy_bandwidth: float
    speed_up: float = 0.0  # against the baseline of record
    of_bytes_ratio: float = 0.0  # speed-up times share of the bytes: 1 where time falls as the bytes do
    partition_ms: float = 0.0
    partition_steps: float = 0.0  # in dense decode steps of the baseline
    prefill_ms: float = 0.0
    buffers_gib: float = 0.0
    peak_gib: float = 0.0
    recompilations: int = 0  # after the first prompt
    recordings: int = 0  # of CUDA graphs, after the first two prompts
    channels_skipped: float = 0.0  # share of a token's FFN channels that are not computed
    batch: int = 1

    def share_of(self, rows: list[BenchRow]) -> float:
        """Of the bytes that the first row of the same batch reads, a dense one."""
        return self.total_bytes / next(row.total_bytes for row in rows if row.batch == self.batch)


_COLUMNS = {
    "ms": "{:.2f}",
    "ms_p10": "{:.2f}",
    "ms_p90": "{:.2f}",
    "tokens_per_second": "{:.1f}",
    "gb_per_second": "{:.1f}",
    "of_copy_bandwidth": "{:.2f}",
    "speed_up": "{:.2f}",
    "of_bytes_ratio": "{:.2f}",
    "partition_steps": "{:.2f}",
    "prefill_ms": "{:.1f}",
    "buffers_gib": "{:.2f}",
    "peak_gib": "{:.1f}",
    "recompilations": "{}",
    "recordings": "{}",
}


def bench_table(rows: list[BenchRow], title: str) -> Table:
    """Rows for people; the share of the baseline's bytes, and of the FFN channels skipped, stand beside the label."""
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("")
    for name in ("batch", "bytes", "skipped", *_COLUMNS):
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*_cells(row, rows))
    return table


def bench_markdown(rows: list[BenchRow]) -> str:
    """Rows as a Markdown table."""
    lines = [
        "| row | batch | bytes | skipped | " + " | ".join(n.replace("_", " ") for n in _COLUMNS) + " |",
        "|---" * (len(_COLUMNS) + 4) + "|",
    ]
    return "\n".join(lines + [f"| {' | '.join(_cells(row, rows))} |" for row in rows])


def _cells(row: BenchRow, rows: list[BenchRow]) -> list[str]:
    own = [row.row, str(row.batch), f"{row.share_of(rows):.1%}", f"{row.channels_skipped:.1%}"]
    return own + [form.format(getattr(row, name)) for name, form in _COLUMNS.items()]


def machine() -> dict:
    """Where a measurement was taken."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "peak_process_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def save_json(file: Path, settings: dict, rows: list[BenchRow]) -> None:
    data = {"machine": machine(), "settings": settings, "rows": [asdict(row) for row in rows]}
    file.write_text(json.dumps(data, indent=1) + "\n")

"""Gathers the results of ``popmm bench --json`` in a folder: prints Markdown tables, writes ``suite.json``.

python benchmarks/table.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from popmm.cli.bench_lossless import lossless_markdown
from popmm.cli.bench_rows import BenchRow, bench_markdown


def main() -> int:
    folder = Path(sys.argv[1])
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json")) if file.name != "suite.json"]
    if not runs:
        print(f"no results in {folder}", file=sys.stderr)
        return 1
    machine = runs[0]["machine"]
    print(f"\n{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}")
    for run in runs:
        rows = run["rows"]
        drafts = "tokens_per_round" in rows[0]
        table = lossless_markdown(rows) if drafts else bench_markdown([BenchRow(**row) for row in rows])
        print(f"\n{run['settings']['title']}\n\n{table}")
    (folder / "suite.json").write_text(json.dumps(runs, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

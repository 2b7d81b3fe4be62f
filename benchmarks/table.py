"""Gathers the results of ``popmm bench --json`` in a folder: prints Markdown tables, writes ``suite.json``.

python benchmarks/table.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

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
        print(f"\n{run['settings']['title']}\n\n{bench_markdown([BenchRow(**row) for row in run['rows']])}")
    (folder / "suite.json").write_text(json.dumps(runs, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Prints the measured tables of docs/speed.md from benchmarks/results/.

python benchmarks/readme_tables.py quality|speed|figures
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).with_name("results")
SHARES = (0.85, 0.7, 0.6, 0.5)


def newest(pattern: str) -> dict:
    return json.loads(sorted(RESULTS.glob(pattern))[-1].read_text())


def quality() -> None:
    """KL to dense at equal bytes: a line per method, a column per model and share."""
    for name in ("stories260K", "babyllama361", "stories", "stories-moe"):
        rows = newest(f"*-equal-bytes-{name}.json")["rows"]
        print(f"\n| {name} | {' | '.join(f'{share:.2f}' for share in SHARES)} |\n|---|{'---|' * len(SHARES)}")
        methods = dict.fromkeys(row["method"] for row in rows[1:])
        cells = {m: {r["bytes_wanted"]: f"{r['kl']:.4f}" for r in rows if r["method"] == m} for m in methods}
        level = {
            m: next((r["kl"] for r in rows if r["method"] == m and r["bytes_wanted"] == 0.7), 9.0) for m in methods
        }
        for method in sorted(methods, key=level.get):
            if not method.startswith("weights"):
                print(f"| {method} | {' | '.join(cells[method].get(share, '-') for share in SHARES)} |")
        rounded = [row for row in rows if row["method"].startswith("weights")]
        print("; ".join(f"{row['method']}, share {row['bytes_share']:.2f}: {row['kl']:.4f}" for row in rounded))


def speed() -> None:
    for shape in ("dense-2k", "moe-1k"):
        print(
            f"\n{shape}\n\n| dtype | row | ms per token, median (p10 to p90) | bytes read, of dense | speed-up "
            "| speed-up x bytes | partition, ms | buffers, GiB |\n|---|---|---|---|---|---|---|---|"
        )
        for dtype in ("float32", "bfloat16"):
            rows = newest(f"*-cpu-{shape}-{dtype}.json")["rows"]
            for r in rows:
                dense = r["row"].startswith("dense")
                rest = "- | -" if dense else f"{r['partition_ms']:.0f} | {r['buffers_gib']:.2f}"
                print(
                    f"| {dtype} | {r['row']} | {r['ms']:.1f} ({r['ms_p10']:.1f} to {r['ms_p90']:.1f}) "
                    f"| {r['total_bytes'] / rows[0]['total_bytes']:.1%} | {r['speed_up']:.2f} "
                    f"| {r['of_bytes_ratio']:.2f} | {rest} |"
                )


def figures() -> None:
    """Draws docs/figures/equal-bytes-NAME.png."""
    from popmm.evaluation.evaluate import Row
    from popmm.evaluation.quality_plots import equal_bytes_figure

    folder = RESULTS.parents[1] / "docs" / "figures"
    folder.mkdir(exist_ok=True)
    for name in ("stories260K", "babyllama361", "stories", "stories-moe", "shapes"):
        rows = [Row(**row) for row in newest(f"*-equal-bytes-{name}.json")["rows"]]
        equal_bytes_figure(rows, f"{name}, bfloat16", folder / f"equal-bytes-{name}.png", exact=name == "shapes")


if __name__ == "__main__":
    {"quality": quality, "speed": speed, "figures": figures}[sys.argv[1]]()

"""docs/models.md: written from the rows of families.py, and read again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

COLUMNS = ("family", "model", "kind", "sites", "present", "status", "reason")
_HEAD = "| family | model | kind | found | present | status | why |"

PAGE = """\
# Models

What popmm does with every model type of transformers' mappings for causal, image-text-to-text and multimodal language
models. Written by `python benchmarks/families.py --markdown docs/models.md` ({versions});
`make test-all` does the same again and compares.

**{total} model types: {built} built, {attached} attached.** {outcome}.
Of the {present} FFNs of the attached ones {sites} are pruned.

- **passed**: a tiny random model of the family was attached with tiers, gate and mask. Of each greedy decoding one pass
  was the prompt, every further token was pruned and none was dense; with nothing pruned the logits were the dense
  model's, bit for bit; after detach every weight had its bytes again.
- **passed, some FFNs dense**: the same; the FFNs named in the last column stay dense, and `summary()` says so.
- **attached, not run**: attach and detach passed; the tiny model itself generates nothing here.
- **attached, never pruned**: `generate` gives it no pass that can be pruned; every pass is dense, and says so.
- **refused**: `attach` raises `UnsupportedModelError` with the sentence in the last column, and leaves the model as it
  was.
- **not built**: no tiny model could be made from the family's defaults here; nothing is known of popmm.

*Present* are the FFNs that a count without popmm's adapters sees (`benchmarks/ffn_count.py`): modules with two weights
from d_model to something wider and back, that compute each token by itself. About one layer of each kind is built, so
these are not a real model's numbers.
"""


def write(file: Path, rows: list[dict]) -> None:
    """Writes the page."""
    import torch
    import transformers

    counts = Counter(row["status"] for row in rows)
    built = len(rows) - counts["not built"]
    attached = built - counts["refused"]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    outcome = "; ".join(f"{n} {status}" for status, n in counts.most_common())
    text = PAGE.format(
        versions=versions,
        total=len(rows),
        built=built,
        attached=attached,
        outcome=outcome,
        sites=_attached(rows, "sites"),
        present=_attached(rows, "present"),
    )
    lines = [text, _HEAD, "|" + "---|" * len(COLUMNS)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row[column]) for column in COLUMNS) + " |")
    file.write_text("\n".join(lines) + "\n")


def read(file: Path) -> list[dict]:
    """The rows of the page."""
    lines = file.read_text().splitlines()
    rows = []
    for line in lines[lines.index(_HEAD) + 2 :]:
        cells = [cell.strip().replace("\\|", "|") for cell in line.strip("| ").replace("\\|", "\0").split(" |")]
        cells = [cell.replace("\0", "|") for cell in cells] + [""] * (len(COLUMNS) - len(cells))
        row = dict(zip(COLUMNS, cells))
        rows.append(row | {key: int(row[key]) for key in ("sites", "present")})
    return rows


def differences(page: list[dict], found: list[dict]) -> list[str]:
    """Where the page says something else than what was found, a line each."""
    said = {row["family"]: row for row in page}
    lines = []
    for row in found:
        for key in ("sites", "present", "status"):
            before = said.get(row["family"], {}).get(key, "nothing")
            if before != row[key]:
                lines.append(f"{row['family']}: {key} is {row[key]} ({row['reason']}), the page says {before}")
    return lines


def _attached(rows: list[dict], key: str) -> int:
    return sum(row[key] for row in rows if row["status"] not in ("refused", "not built"))


def _cell(value) -> str:
    return str(value).replace("|", "\\|")

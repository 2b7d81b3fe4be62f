"""The fenced blocks of README.md and docs/, and what of them needs a stand-in to run offline."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from popmm import zoo

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# commands in running text, and those indented by four
INLINE = re.compile(r"`(popmm [a-z]+(?: [^`]*)?)`")
INDENTED = re.compile(r"^    (popmm (?:.*\\\n)*.*)$", re.MULTILINE)

# what a user would download, and the bundled model of the same kind
STAND_INS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": str(zoo.path("stories")),
    "Qwen/Qwen2.5-VL-3B-Instruct": str(zoo.path("shapes")),
    "Qwen/Qwen3-0.6B": "zoo:shapes",  # a chat template is needed
    "zoo:smollm2-135m": "zoo:stories",
}
# files that the pages name, made for the test
PICTURE = "photo.jpg"
STORY = "Once upon a time there was a little girl named Lily. She had a red ball and a big dog. They went out. "
TEXTS = ("text.txt", "wikitext2_test.txt")
ITEMS = {
    "hellaswag.jsonl": {
        "activity_label": "Playing",
        "ctx_a": "Lily had a ball.",
        "ctx_b": "she",
        "endings": ["no no", "played with it.", "tree", "sat"],
        "label": 1,
    },
    "gsm8k_test.jsonl": {"question": "Lily has 2 balls and 3 dogs. How many?", "answer": "Lily has 2 + 3 = 5.\n#### 5"},
}
# placeholders, as the text writes them
PLACES = {"PATH_OR_ID": "zoo:stories", "MODEL": "zoo:stories", "FILE": "text.txt", "ID": "zoo:stories"}
PLACES |= {"N": "1", "DTYPE": "bfloat16"}


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    """All of them, in order."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            name, line = str(page.relative_to(ROOT)), text.count("\n", 0, match.start()) + 1
            found.append(Block(name, line, match[1], match[2]))
    return found


def commands(block: Block) -> list[str]:
    """A block's command lines, continued ones joined, without comments."""
    lines = (re.sub(r"(^|\s)#\s.*$", "", line) for line in block.text.replace("\\\n", " ").splitlines())
    return [" ".join(line.split()) for line in lines if line.strip()]


def variants(command: str) -> list[list[str]]:
    """A command's words, placeholders replaced: without what stands in brackets, then with each of it."""
    optional = re.findall(r"\[([^\]]+)\]", command)
    plain = re.sub(r"\[[^\]]+\]", "", command)
    return [[_real(word) for word in shlex.split(f"{plain} {more}")] for more in ("", *optional)]


def _real(word: str) -> str:
    return PLACES.get(word, STAND_INS.get(word, word))


def mentioned() -> list[tuple[str, str]]:
    """(page, command) of every ``popmm`` command that stands in running text."""
    found = []
    for page in PAGES:
        text = FENCE.sub("", page.read_text())
        commands = [match[1] for pattern in (INLINE, INDENTED) for match in pattern.finditer(text)]
        found += [(page.name, " ".join(command.replace("\\\n", " ").split())) for command in commands]
    return found

"""What README.md and docs/ tell to type runs, as it stands there: on bundled models where it would download one."""

import io
import json
import re
import sys
import warnings

import pytest
import torch
from served import serving
from snippets import ITEMS, PICTURE, ROOT, STAND_INS, STORY, TEXTS, blocks, commands, mentioned, variants

import popmm
from popmm import zoo
from popmm.cli import main
from popmm.cli.main import build_parser

BLOCKS = blocks()
PYTHON = [block for block in BLOCKS if block.language == "python"]
CONSOLE = [
    (block, command)
    for block in BLOCKS
    if block.language != "python" and re.match(r"(popmm|make|pip|python|lm_eval|vllm) ", block.text)
    for command in commands(block)
]

# Python blocks that go on from another, which runs before them
GOES_ON = {"attach(model, lossless=True)": "SmolLM2-135M-Instruct"}
# Python blocks that are compiled, not run, with the reason
COMPILED = {
    "lmms_eval": "lmms-eval is no dependency",
    "tp_plan": "two processes; tests/runtime/test_tensor_parallel.py",
    "from vllm": "an environment of its own; tests/engines/test_vllm.py",
    "openai.OpenAI": "needs a server; test_the_client_of_the_page_on_serving",
}
# commands whose options are read and which do not run, with the reason
PARSED = {
    "popmm zoo get": "downloads",
    "popmm serve": "does not end; test_the_client_of_the_page_on_serving",
    "--tasks arc_easy": "the harness downloads the task",
    "--preset paper": "the harness downloads the tasks",
}
# commands of other programs that do not run, with the reason
ELSEWHERE = {
    "lm_eval": "downloads; tests/evaluation/test_harness.py runs it on local tasks",
    "python -m vllm": "an environment of its own; tests/engines/test_vllm.py",
    "python -c": "an environment of its own; tests/engines/test_vllm.py",
    "pip uninstall": "changes the environment",
}
# what commands are given too: with a llama-3.1-8b of 16 GB, or hundreds of pictures, they would take too long
SMALL = {
    "popmm bench --shape": "--tiny --rounds 1 --prompt-tokens 8 --new-tokens 8",
    "--task shapes": "--pictures 4 --seeds 2",
}
SLOW = ("popmm eval", "popmm bench")


def named(*values):
    return re.sub(r"\s+", " ", " ".join(map(str, values)))[:70]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader would be: with a photo, texts, and tasks in the form of the real ones."""
    from PIL import Image

    Image.open(zoo.picture()).convert("RGB").save(tmp_path / PICTURE)
    for name in TEXTS:
        (tmp_path / name).write_text(STORY * 70)
    for name, item in ITEMS.items():
        (tmp_path / name).write_text((json.dumps(item) + "\n") * 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(text, scope):
    for name, here in STAND_INS.items():
        text = text.replace(f'"{name}"', repr(here))
    exec(compile(text, "<block>", "exec"), scope)


def find(words):
    (block,) = [block for block in PYTHON if words in block.text]
    return block


def not_here(text, reasons):
    return any(words in text for words in reasons)


@pytest.mark.parametrize("block", [b for b in PYTHON if not_here(b.text, COMPILED)], ids=str)
def test_python_blocks_that_cannot_run_here_name_what_popmm_has(block):
    compile(block.text, str(block), "exec")
    for name in re.findall(r"\bpopmm\.(\w+)", block.text):
        assert hasattr(popmm, name), name
    for arguments in re.findall(r"popmm\.(?:PopConfig\.paper|attach)\((?:model, )?([^()]*)\)", block.text):
        eval(f"popmm.PopConfig({arguments})")


@pytest.mark.parametrize("block", [b for b in PYTHON if not not_here(b.text, COMPILED)], ids=str)
def test_python_blocks_run(block, folder):
    scope = {}
    for words, first in GOES_ON.items():
        if words in block.text:
            run_python(find(first).text, scope)
    run_python(block.text, scope)


def test_the_first_example_of_the_readme_prunes_and_gives_the_model_back(folder):
    scope, text = {}, find("SmolLM2-135M-Instruct").text
    run_python(text, scope)
    assert scope["state"].passes["decode"] > 0, scope["state"].passes
    fresh, _ = zoo.load("stories", dtype=scope["model"].dtype)
    assert all(torch.equal(a, b) for a, b in zip(scope["model"].parameters(), fresh.parameters()))


def test_options_in_blocks_exist():
    own = [command for _, command in CONSOLE if command.startswith("popmm ")]
    assert len(own) > 10
    for command in own:
        for words in variants(command):
            build_parser().parse_args(words[1:])


@pytest.mark.parametrize(
    "block, command",
    [
        pytest.param(block, command, id=named(block, command), marks=[pytest.mark.slow] * command.startswith(SLOW))
        for block, command in CONSOLE
        if not command.startswith(tuple(ELSEWHERE))
    ],
)
def test_commands_run(block, command, folder, monkeypatch):
    program = command.split()[0]
    if program == "make":
        assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert set(re.findall(r"popmm\[(\w+)\]", command)) <= set(known)
    elif program == "python":
        assert (ROOT / command.split()[1]).is_file()
    else:
        assert program == "popmm"
        for words in variants(command):
            run_command(command, words[1:], folder, monkeypatch)


def run_command(command, words, folder, monkeypatch):
    if not_here(command, PARSED):
        return
    if "--image" in words:
        words = ["zoo:shapes" if word == "zoo:stories" else word for word in words]
    for told, more in SMALL.items():
        words += more.split() if told in command else []
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is in the picture?\n/stats\n/quit\n"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(words) == 0
    for option in ("--out", "--json", "--plot"):
        if option in words[:-1] and not (written := words[words.index(option) + 1]).startswith("-"):
            assert (folder / written).stat().st_size > 0


@pytest.mark.parametrize("page, command", mentioned(), ids=named)
def test_commands_in_running_text_have_options_that_exist(page, command):
    if "..." in command.replace('"..."', ""):
        command = command.split("...")[0].rstrip(' ";')  # the text leaves the rest to the reader
        command += '"' * (command.count('"') % 2)
    for words in variants(command):
        build_parser().parse_args(words[1:])


@pytest.mark.slow  # a server
def test_the_client_of_the_page_on_serving():
    block = find("openai.OpenAI")
    with serving(popmm.PopConfig(), load=lambda: zoo.load("shapes"), name="zoo:shapes") as server:
        run_python(block.text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}"), {})


def test_every_block_is_run_or_named_with_a_reason():
    told = {*(str(b) for b in PYTHON), *(str(b) for b, _ in CONSOLE)}
    others = [block for block in BLOCKS if str(block) not in told]
    assert [str(b) for b in others if b.language or ("│" not in b.text and "──►" not in b.text)] == []  # drawings
    texts = [block.text for block in BLOCKS]
    texts += [command for _, command in CONSOLE]
    for words in (*GOES_ON, *COMPILED, *PARSED, *ELSEWHERE, *STAND_INS):
        assert any(words in text for text in texts), f"no page says {words!r} any more"

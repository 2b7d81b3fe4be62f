"""Options of the command line: lists, help and refusals, which answer without loading torch."""

import subprocess
import sys
import time

import pytest

import popmm
from popmm.cli import main
from popmm.cli.arguments import listed
from popmm.evaluation.methods import METHODS


@pytest.mark.parametrize("separator", [",", ", ", ";", "; "])
def test_names_that_hold_a_comma_are_one_name(separator):
    names = ["mask", "gate, 4 bit", "gate", "mask, experts share a partition", "keep"]
    assert listed(separator.join(names), METHODS) == names
    assert listed("gate,4 bit,gate", METHODS) == ["gate, 4 bit", "gate"]
    assert listed("nonsense, gate", METHODS) == ["nonsense", "gate"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["generate", "--nonsense"], ["generate", "--seed", "x"]]
)
def test_help_and_wrong_options_answer_without_loading_torch(arguments):
    code = "import sys; from popmm.cli import main\n"
    code += "try: main(sys.argv[1:])\nfinally: print('torch' in sys.modules, 'transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "False False"
    if "--help" not in arguments and "--version" not in arguments:
        assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and "--help lists" in run.stderr


def test_help_answers_at_once():
    times = []
    for _ in range(3):  # the machine may be busy: the best of three
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "popmm.cli", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_settings_are_checked_before_torch_is_loaded():
    code = "import sys; from popmm.cli import main\nprint(main(sys.argv[1:]), 'torch' in sys.modules)"
    for arguments in (["generate", "--pruning-ratio", "1.2"], ["eval", "--ratios", "x"], ["chat", "--fill", "x"]):
        run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert run.stdout == "2 False\n"


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"popmm {popmm.__version__}\n"


def test_the_help_tells_the_default_share(capsys):
    for command in ("chat", "generate", "inspect"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "share of the 16-bit FFN bytes to read (0.33)" in " ".join(capsys.readouterr().out.split())


def test_the_surface_is_loaded_when_asked_for():
    code = "import sys, popmm; assert 'torch' not in sys.modules\n"
    code += "import popmm.evaluation.evaluate, popmm.attach\n"
    code += "assert callable(popmm.attach) and popmm.attach.__name__ == 'attach', popmm.attach\n"
    code += "assert popmm.conversation.Conversation and popmm.adapters.describe and popmm.zoo.load and popmm.budget\n"
    code += "assert all(hasattr(popmm, name) for name in popmm.__all__) and not hasattr(popmm, 'nonsense')"
    subprocess.run([sys.executable, "-c", code], check=True)

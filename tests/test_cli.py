"""The command line, run in this process on the bundled models."""

import json

import pytest
from PIL import Image

from popmm.cli import main
from popmm.methods import METHODS

SHORT = ["--max-new-tokens", "8"]


def test_generate_streams_text(capsys):
    assert main(["generate", "--prompt", "Once upon a time", "--pruning-ratio", "0.2", *SHORT]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Once upon a time")
    assert "8 tokens at" in out and "FFN weights per token" in out.replace("\n", " ")


@pytest.mark.parametrize("model", ["zoo:stories", "zoo:stories-moe"])
def test_generate_compare_shows_both_and_their_cost(model, capsys):
    assert main(["generate", "--model", model, "--compare", "--pruning-ratio", "0.2", *SHORT]) == 0
    out = capsys.readouterr().out
    for words in (
        "dense",
        "gate, 20% pruned",
        "tokens/s",
        "FFN bytes per token",
        "partition time",
        "same leading tokens",
    ):
        assert words in out


def test_compare_at_ratio_zero_agrees_entirely(capsys):
    assert main(["generate", "--compare", "--pruning-ratio", "0", *SHORT]) == 0
    out = capsys.readouterr().out
    assert "8 of 8" in out and "100.0%" in out


@pytest.mark.parametrize("model", ["zoo:stories", "zoo:stories-moe"])
def test_inspect_writes_a_picture(model, tmp_path, capsys):
    file = tmp_path / "picture.png"
    assert main(["inspect", "--model", model, "--out", str(file), *SHORT]) == 0
    assert Image.open(file).size[0] > 500
    out = capsys.readouterr().out
    assert "model.layers.0.mlp" in out and str(file) in out


def test_eval_prints_a_table_and_writes_json(tmp_path, capsys):
    text, result = tmp_path / "text.txt", tmp_path / "rows.json"
    story = "Once upon a time there was a cat. The cat was happy and sat on a big red mat in the sun. " * 4
    text.write_text("<|endoftext|>".join(f"{i} {story}" for i in range(4)))
    arguments = ["--text", str(text), "--ratios", "0.2", "--context", "20", "--continuation", "20"]
    arguments += ["--texts-per-subset", "2", "--subsets", "2", "--json", str(result)]
    assert main(["eval", *arguments]) == 0
    out = capsys.readouterr().out
    assert "| mask | 20% pruned |" in out and "4 texts in 2 disjoint subsets" in out
    rows = json.loads(result.read_text())["rows"]
    expected = [name for name, method in METHODS.items() if not method.experts_only and not method.calibrated]
    assert [row["method"] for row in rows] == ["dense", *expected]


def test_eval_at_equal_bytes_draws_a_picture(tmp_path, capsys):
    plot = tmp_path / "plot.png"
    arguments = ["--bytes", "0.7,0.5", "--methods", "mask;CATS;gate;weights at int4", "--dtype", "bfloat16"]
    sizes = ["--context", "10", "--continuation", "10", "--texts-per-subset", "2", "--subsets", "2"]
    assert main(["eval", *arguments, *sizes, "--calibration", "2", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "| gate | 70% of bytes |" in out and "| CATS | 50% of bytes |" in out and "| weights at int4 |" in out
    assert Image.open(plot).size[0] > 500


def test_eval_names_methods_that_cannot_read_so_little(capsys):
    sizes = ["--context", "10", "--continuation", "10", "--texts-per-subset", "2", "--subsets", "1"]
    assert main(["eval", "--bytes", "0.5", "--methods", "all re-scored;gate", *sizes]) == 0
    assert "left out: all re-scored cannot read as little as 50%" in capsys.readouterr().out


def test_a_candidate_fraction_alone_asks_for_mask(capsys):
    assert main(["generate", "--candidate-fraction", "0.2", *SHORT]) == 0
    mask = capsys.readouterr().out.splitlines()[-1]
    assert main(["generate", "--candidate-fraction", "0.2", "--selection", "mask", *SHORT]) == 0
    assert mask.split("(")[-1] == capsys.readouterr().out.splitlines()[-1].split("(")[-1]


def test_eval_sweeps_gamma(tmp_path, capsys):
    sizes = ["--context", "10", "--continuation", "10", "--texts-per-subset", "2", "--subsets", "1"]
    plot = ["--plot", str(tmp_path / "plot.png")]
    assert main(["eval", "--sweep", "gamma", "--ratios", "0.2", *sizes, *plot]) == 0
    out = capsys.readouterr().out
    assert all(f"| mask, gamma {gamma} | 20% pruned |" in out for gamma in (0.0, 0.1, 0.5))
    assert Image.open(tmp_path / "plot.png").size[0] > 500


def test_eval_at_equal_bytes_about_pictures(capsys):
    arguments = ["--model", "zoo:shapes", "--task", "shapes", "--bytes", "0.7", "--methods", "mask;gate"]
    assert main(["eval", *arguments, "--pictures", "1", "--seeds", "2"]) == 0
    assert "exact answers" in capsys.readouterr().out


def test_inspect_draws_the_dynamics(tmp_path, capsys):
    file = tmp_path / "dynamics.png"
    assert main(["inspect", "--dynamics", "--out", str(file), *SHORT]) == 0
    assert "of a step's top half is in the prompt's" in capsys.readouterr().out
    assert Image.open(file).size[0] > 500


def test_eval_without_a_text_uses_the_models_own_samples(capsys):
    arguments = ["--ratios", "0.2", "--methods", "keep", "--context", "10", "--continuation", "10"]
    assert main(["eval", *arguments, "--texts-per-subset", "2", "--subsets", "1"]) == 0
    assert "| keep | 20% pruned |" in capsys.readouterr().out


def test_demo_compares_20_and_40_percent(capsys):
    assert main(["demo", *SHORT]) == 0
    out = capsys.readouterr().out
    assert "20% pruned" in out and "40% pruned" in out and "top-1 along the dense text" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "--pruning-ratio", "1.2"], "pruning_ratio=1.2 is not a ratio"),
        (["generate", "--pruning-ratio", "0.9"], "at most 95% may go"),
        (["generate", "--prompt", " "], "the prompt is empty"),
        (["generate", "--model", "zoo:nothing"], "no bundled model is called 'nothing'"),
        (["generate", "--selection", "best"], "selection='best'"),
        (["generate", "--chat"], "no chat template"),
        (["generate", "--temperature", "-1"], "--temperature -1.0: give 0 (greedy) or more"),
        (["generate", "--model", "/nowhere/model"], "there is no such folder"),
        (["inspect", "--out", "/nowhere/picture.png"], "there is no folder /nowhere"),
        (["generate", "--max-new-tokens", "0"], "--max-new-tokens 0: give 1 or more"),
        (["eval", "--ratios", "0.2,1.5"], "ratio 1.5: give numbers from 0 to below 1"),
        (["eval", "--bytes", "1.5"], "--bytes 1.5: give shares between 0 and 1"),
        (["eval", "--bytes", "x"], "'x': give numbers separated by commas"),
        (["eval", "--methods", "best"], "unknown method 'best'"),
        (["eval", "--plot", "rows.foo"], "give a name that ends in one of .png"),
        (["eval", "--bytes", "0.7", "--gate-bits", "4"], "--selection or --gate-bits with methods, which set them"),
        (["eval", "--task", "shapes", "--plot", "x.png"], "--plot with --task shapes, which needs --bytes"),
        (["eval", "--sweep", "gamma", "--task", "shapes"], "--sweep with --tasks, --preset or --task shapes"),
        (["eval", "--sweep", "gamma", "--methods", "gate"], "--sweep, which is of mask, with"),
        (["eval", "--preset", "paper-qa", "--fill", "mean"], "--preset, the paper's own, with other settings"),
        (["eval", "--preset", "paper-qa", "--ratios", "0.9"], "--preset, which has its own, with --ratios"),
        (["eval", "--limit", "3"], "--limit, --batch, --include-path or --run-code without --tasks"),
        (["eval", "--continuation", "4"], "give a continuation of 8 tokens or more"),
        (["eval", "--start", "-3"], "share of the texts to skip"),
        (["eval", "--text", "/nowhere/text.txt"], "No such file"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and len(err.splitlines()) == 1


def test_interrupt_ends_quietly(capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("popmm.compare.timed_generate", interrupt)
    assert main(["generate", *SHORT]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_one_new_token_needs_no_decode_step(tmp_path, capsys):
    one = ["--max-new-tokens", "1"]
    assert main(["generate", "--compare", *one]) == 0
    assert main(["generate", *one]) == 0
    assert main(["inspect", "--out", str(tmp_path / "picture.png"), *one]) == 0
    assert "1 of 1" in capsys.readouterr().out

"""The command line, run in this process on the bundled models."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import popmm
from popmm import zoo
from popmm.cli import main
from popmm.cli.compare import check_pruned, compare, comparison_table
from popmm.evaluation.methods import METHODS
from popmm.report import to_text
from popmm.zoo.encoding import encode
from popmm.zoo.loading import load_model

SHORT = ["--max-new-tokens", "8"]
PROMPT = "Once upon a time"
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def row(table, name):
    """Cells of the line of a printed table that begins with a name."""
    [line] = [line for line in table.splitlines() if line.strip().startswith(name)]
    return line.strip().removeprefix(name).split()


@pytest.fixture(scope="module")
def with_template(tmp_path_factory):
    """A saved bfloat16 model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("models") / "instruct"
    model, tokenizer = zoo.load("stories")
    tokenizer.chat_template = TEMPLATE
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_generate_gives_the_text_to_stdout_and_the_figures_to_stderr(capsys):
    assert main(["generate", "--prompt", PROMPT, "--pruning-ratio", "0.2", *SHORT]) == 0
    out, err = capsys.readouterr()
    model, tokenizer = zoo.load("stories")
    with popmm.pruned(model, pruning_ratio=0.2):
        ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), do_sample=False, max_new_tokens=8)[0]
    assert out == tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    assert "8 tokens at" in err and "FFN weights per token" in err and "skipping 0.0% of the FFN channels" in err


def test_generate_reads_the_prompt_from_stdin(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    assert main(["generate", "--prompt", "-", *SHORT]) == 0
    piped = capsys.readouterr().out
    assert main(["generate", "--prompt", PROMPT, *SHORT]) == 0
    assert piped == capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["generate", "--prompt", "-", *SHORT]) == 2
    assert "the prompt (stdin) is empty" in capsys.readouterr().err


def test_generate_as_json_is_all_that_stdout_holds(capsys):
    assert main(["generate", "--prompt", PROMPT, "--json", *SHORT]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 8 and found["passes"] == {"prompt": 1, "decode": 7, "dense": 0}
    assert found["channels_skipped"] == pytest.approx(0.1, abs=1e-3)
    assert found["ffn_bytes_per_token"] < found["dense_ffn_bytes_per_token"] == 6 * 3 * 768 * 128 * 4
    assert main(["generate", "--prompt", PROMPT, *SHORT]) == 0
    assert capsys.readouterr().out == PROMPT + found["text"] + "\n"


@pytest.mark.parametrize("model", ["zoo:stories", "zoo:stories-moe"])
def test_generate_compare_shows_both_and_their_cost(model, capsys):
    assert main(["generate", "--model", model, "--compare", "--pruning-ratio", "0.2", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert "dense" in out and "gate, 20% pruned" in out and "tokens/s" not in out
    for words in ("tokens/s", "FFN bytes per token", "partition time", "same leading tokens"):
        assert words in err
    # in float32 nearly all that 20 % saves is the rounding of the gate rows
    assert row(err, "FFN channels skipped") == ["0.0%", "0.0%" if model == "zoo:stories" else "0.4%"]


def test_a_comparison_by_bytes_says_so(capsys):
    assert main(["generate", "--compare", "--bytes", "0.25", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert "tiers, 25% of the 16-bit bytes read" in " ".join(out.split())
    assert row(err, "of dense") == ["100.0%", "12.5%"]  # of float32


def test_channels_skipped_are_those_outside_the_budget(capsys):
    assert main(["generate", "--compare", "--json", "--ffn-ratio", "0.5", "--selection", "mask", *SHORT]) == 0
    dense, pruned = json.loads(capsys.readouterr().out)["runs"]
    assert dense["channels_skipped"] == 0 and "top1_agreement" not in dense
    assert pruned["channels_skipped"] == 0.5 and 0 <= pruned["top1_agreement"] <= 1
    assert dense["tokens"] == pruned["tokens"] == 8 and dense["text"]


def test_compare_at_ratio_zero_agrees_entirely(capsys):
    assert main(["generate", "--compare", "--pruning-ratio", "0", *SHORT]) == 0
    err = capsys.readouterr().err
    assert "8 of 8" in err and row(err, "top-1 along the dense text") == ["-", "100.0%"]


def test_a_comparison_that_pruned_nothing_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("popmm.runtime.passes.Passes.count", lambda *_: None)
    assert main(["generate", "--compare", "--pruning-ratio", "0.2", *SHORT]) == 2
    assert "gate, 20% pruned: none of 7 decode steps was pruned" in capsys.readouterr().err
    assert main(["demo", *SHORT]) == 2
    assert "33% of the bytes: none of 7 decode steps was pruned" in capsys.readouterr().err


def test_what_counts_as_nothing_pruned():
    def state(decode, is_dense=False):
        return SimpleNamespace(is_dense=is_dense, passes={"decode": decode})

    for fine in ((state(3), 4), (state(0), 1), (state(0), 0), (state(0, is_dense=True), 4)):
        check_pruned(fine[0], "x", fine[1])
    with pytest.raises(RuntimeError, match="x: none of 3 decode steps was pruned"):
        check_pruned(state(0), "x", 4)


def test_a_model_is_asked_in_its_chat_template(with_template, capsys):
    arguments = ["generate", "--model", str(with_template), "--prompt", "Hi there", *SHORT]
    assert main([*arguments, "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--no-chat", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    _, tokenizer = load_model(str(with_template))
    assert asked["prompt_tokens"] == len(tokenizer("Hi there ", add_special_tokens=False)["input_ids"])
    assert plain["prompt_tokens"] == len(tokenizer("Hi there")["input_ids"])
    assert main(arguments) == 0  # an answer stands without its question
    assert capsys.readouterr().out == asked["text"] + "\n"


def test_the_bundled_vision_model_answers_text_in_its_template(capsys):
    assert main(["generate", "--model", "zoo:shapes", "--prompt", "How many shapes are there?", *SHORT]) == 0
    out = capsys.readouterr().out
    assert out.strip() and "<|im_start|>" not in out and "How many" not in out


@pytest.mark.parametrize("more", [[], ["--compare"], ["--compare", "--json"]])
def test_a_model_that_ends_at_once_has_no_rates_and_gets_advice(with_template, capsys, monkeypatch, more):
    def ends(self, inputs=None, streamer=None, **kwargs):
        ids = torch.cat([kwargs["input_ids"], torch.tensor([[self.config.eos_token_id]])], 1)
        self(kwargs["input_ids"])
        if streamer is not None:
            streamer.put(kwargs["input_ids"][0])
            streamer.put(ids[0, -1:])
            streamer.end()
        return ids

    monkeypatch.setattr("transformers.GenerationMixin.generate", ends)
    assert main(["generate", "--model", str(with_template), "--no-chat", "--prompt", "Hi", *more]) == 0
    out, err = capsys.readouterr()
    assert "nothing was generated" in err and "leave --no-chat out" in err and "nan" not in out + err
    if more == ["--compare"]:
        assert row(err, "tokens/s") == ["-", "-"] and row(err, "top-1 along the dense text") == ["-", "-"]
    if "--json" in more:
        assert json.loads(out)["runs"][1]["top1_agreement"] is None


def test_a_comparison_of_nothing_decoded_has_no_agreement():
    model, tokenizer = zoo.load("stories")
    runs = compare(model, encode(tokenizer, PROMPT, "cpu"), {"x": popmm.PopConfig()}, max_new_tokens=1)
    assert row(to_text(comparison_table(runs)), "top-1 along the dense text") == ["-", "-"]


def test_a_prompt_beyond_the_models_context_is_refused_before_it_runs(capsys, monkeypatch):
    monkeypatch.setattr("transformers.GenerationMixin.generate", lambda *_, **__: pytest.fail("ran"))
    for arguments in (["generate"], ["generate", "--compare"], ["inspect"]):
        assert main([*arguments, "--prompt", "one two three", "--max-new-tokens", "510"]) == 2
        assert "and 510 new ones are more than the model's 512: give --max-new-tokens" in capsys.readouterr().err
    assert main(["bench", "--model", "zoo:stories", "--prompt-tokens", "600"]) == 2
    assert "a prompt of 600 tokens and 128 new ones are more than the model's 512" in capsys.readouterr().err
    assert main(["eval", "--context", "500", "--continuation", "13"]) == 2
    assert "a prompt of 500 tokens and 13 new ones" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["zoo:stories", "zoo:stories-moe"])
def test_inspect_writes_a_picture(model, tmp_path, capsys):
    file = tmp_path / "picture.png"
    assert main(["inspect", "--model", model, "--out", str(file), *SHORT]) == 0
    width, height = Image.open(file).size
    assert width > 500 and height <= 1600
    out, err = capsys.readouterr()
    assert "model.layers.0-" in out and str(file) in err


def test_inspect_as_json_tells_what_the_picture_shows(tmp_path, capsys):
    file = tmp_path / "picture.png"
    assert main(["inspect", "--json", "--out", str(file), *SHORT]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == [str(file)] and found["passes"]["decode"] == 7
    layer = found["layers"]["model.layers.0.mlp"]
    assert (layer["retained"], layer["candidate"], layer["d_ff"]) == (0, 768, 768)
    assert sum(layer["chosen_always_at_times_never"]) == pytest.approx(1)
    assert layer["chosen_always_at_times_never"][1] > 0.3  # chosen anew per token


def deprecations(records, logged):
    return [str(text) for text in [*(r.message for r in records), *logged] if "deprecat" in str(text).lower()]


def test_our_own_calls_use_nothing_deprecated(recwarn, monkeypatch, capsys):
    from transformers.utils import logging

    logged = []
    logger = logging.get_logger("transformers")
    type(logger).warning_once.cache_clear()
    monkeypatch.setattr(type(logger), "warning", lambda self, message, *_, **__: logged.append(message))
    model, tokenizer = zoo.load("stories")
    model_shapes, processor = zoo.load("shapes")
    ids = tokenizer("One day, Lily met a shiny fairy in the big garden.", return_tensors="pt")["input_ids"]
    config = popmm.PopConfig(pruning_ratio=0.3)
    compare(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"x": config}, max_new_tokens=4)
    from popmm.conversation import Conversation
    from popmm.evaluation.evaluate import Wanted, evaluate
    from popmm.evaluation.texts import cases_of

    evaluate(model, [cases_of([ids[0]], 6)], [Wanted("gate", pruning_ratio=0.3)], config)
    talk = Conversation(model_shapes, processor, config, max_new_tokens=4)
    talk.ask("How many shapes are there?")
    assert not talk.ask("And now?").read_again  # on the kept cache
    talk.close()
    assert main(["generate", *SHORT]) == 0
    assert deprecations(recwarn, logged) == []


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
    arguments = ["--bytes", "0.7,0.5", "--methods", "mask,CATS,gate,weights at int4", "--dtype", "bfloat16"]
    sizes = ["--context", "10", "--continuation", "10", "--texts-per-subset", "2", "--subsets", "2"]
    assert main(["eval", *arguments, *sizes, "--calibration", "2", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    header, _, *lines = [line.split(" | ") for line in out.splitlines() if line.startswith("|")]
    assert header[3] == "skipped"
    skipped = {(line[0].removeprefix("| "), line[1]): line[3] for line in lines}
    assert skipped["dense", "0% pruned"] == skipped["weights at int4", "0% pruned"] == "0.0%"
    assert float(skipped["gate", "50% of bytes"].rstrip("%")) > 30
    assert float(skipped["CATS", "50% of bytes"].rstrip("%")) > 60  # 16-bit gate rows are two thirds of its bytes
    assert "| gate | 70% of bytes |" in out and "| CATS | 50% of bytes |" in out and "| weights at int4 |" in out
    assert Image.open(plot).size[0] > 500


def test_eval_names_methods_that_cannot_read_so_little(capsys):
    sizes = ["--context", "10", "--continuation", "10", "--texts-per-subset", "2", "--subsets", "1"]
    assert main(["eval", "--bytes", "0.5", "--methods", "all re-scored;gate", *sizes]) == 0
    assert "left out: all re-scored cannot read as little as 50%" in capsys.readouterr().out


def test_a_candidate_fraction_alone_asks_for_mask(capsys):
    assert main(["generate", "--candidate-fraction", "0.2", *SHORT]) == 0
    mask = capsys.readouterr().err.splitlines()[-1]
    assert main(["generate", "--candidate-fraction", "0.2", "--selection", "mask", *SHORT]) == 0
    assert mask.split("(")[-1] == capsys.readouterr().err.splitlines()[-1].split("(")[-1]


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


def test_demo_compares_a_third_and_a_quarter_of_the_bytes(capsys):
    assert main(["demo", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert "33% of the bytes" in out and "25% of the bytes" in out and "top-1 along the dense text" in err
    assert row(err, "FFN channels skipped") == ["0.0%", "10.0%", "18.6%"]


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
        (["generate", "--model", "/nowhere/model"], "there is no such folder or file"),
        (["inspect", "--out", "/nowhere/picture.png"], "there is no folder /nowhere"),
        (["generate", "--max-new-tokens", "0"], "--max-new-tokens 0: give 1 or more"),
        (["eval", "--ratios", "0.2,1.5"], "ratio 1.5: give numbers from 0 to below 1"),
        (["eval", "--bytes", "1.5"], "--bytes 1.5: give shares between 0 and 1"),
        (["eval", "--bytes", "x"], "'x': give numbers separated by commas"),
        (["eval", "--methods", "best"], "unknown method 'best'"),
        (["eval", "--plot", "rows.foo"], "give a name that ends in one of .png"),
        (
            ["eval", "--bytes", "0.7", "--gate-bits", "4"],
            "--selection, --gate-bits or --weight-bits with methods, which set them",
        ),
        (["eval", "--task", "shapes", "--plot", "x.png"], "--plot with --task shapes, which needs --bytes"),
        (["eval", "--sweep", "gamma", "--task", "shapes"], "--sweep with --tasks, --preset or --task shapes"),
        (["eval", "--sweep", "gamma", "--methods", "gate"], "--sweep, which is of mask, with"),
        (["eval", "--preset", "paper-qa", "--fill", "mean"], "--preset, the paper's own, with other settings"),
        (["eval", "--preset", "paper-qa", "--ratios", "0.9"], "--preset, which has its own, with --ratios"),
        (["eval", "--limit", "3"], "--limit, --include-path, --task-file or --run-code without --tasks"),
        (["eval", "--continuation", "4"], "give a continuation of 8 tokens or more"),
        (["eval", "--start", "-3"], "share of the texts to skip"),
        (["eval", "--text", "/nowhere/text.txt"], "there is no such file"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and len(err.splitlines()) == 1


def test_interrupt_ends_quietly(capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("popmm.runtime.clock.timed_generate", interrupt)
    assert main(["generate", *SHORT]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_one_new_token_needs_no_decode_step(tmp_path, capsys):
    one = ["--max-new-tokens", "1"]
    assert main(["generate", "--compare", *one]) == 0
    assert main(["generate", *one]) == 0
    assert "1 of 1" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["zoo:stories", "zoo:stories-moe"])
def test_a_picture_of_no_decode_step_is_refused(model, tmp_path, capsys):
    file = tmp_path / "picture.png"
    assert main(["inspect", "--model", model, "--out", str(file), "--max-new-tokens", "1"]) == 2
    assert "nothing was decoded after the prompt" in capsys.readouterr().err and not file.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "--image", "nofile.jpg"], "there is no file nofile.jpg"),
        (["chat", "--model", "zoo:stories", "--image", str(zoo.picture())], "zoo:stories reads text alone"),
        (["generate", "--temperature", "nan"], "--temperature nan: give 0 (greedy) or more"),
        (["inspect", "--out", "x.txt"], "x.txt: give a name that ends in one of .png"),
        (["bench", "--shape", "dense-2k", "--new-tokens", "4"], "--new-tokens 4: give 8 or more"),
    ],
)
def test_what_cannot_be_used_is_an_error(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_progress_shows_where_there_is_no_terminal(capsys):
    from popmm.evaluation.progress import progress

    with progress() as bars:
        bar = bars.add_task("measuring", total=40)
        for _ in range(40):
            bars.advance(bar)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "measuring: 4 of 40" and told[-1] == "measuring: 40 of 40" and len(told) == 10

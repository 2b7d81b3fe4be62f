"""``--lossless`` in the terminal: the dense model's text, and what drafting it has cost."""

import json

import pytest
import torch

from popmm import zoo
from popmm.cli import main
from popmm.cli.bench_lossless import LosslessBench, prompts
from popmm.config import PopConfig


def test_compare_shows_the_dense_text_and_the_drafts(capsys):
    how = ["generate", "--lossless", "--draft-tokens", "4", "--compare", "--json", "--max-new-tokens", "24"]
    assert main(how) == 0
    dense, ours = json.loads(capsys.readouterr().out)["runs"]
    assert ours["text"] == dense["text"] and ours["same_leading_tokens"] == 24
    assert ours["drafted"] >= ours["accepted"] > 0 and 1 < ours["tokens_per_round"] <= 5
    assert ours["channels_skipped"] == 0 and ours["ffn_bytes_per_token"] > dense["ffn_bytes_per_token"] / 5
    assert main([*how[:-3], "--max-new-tokens", "24"]) == 0
    printed = "".join(capsys.readouterr())
    assert "tokens per round" in printed and f"{ours['accepted']} of {ours['drafted']}" in printed


def test_generate_tells_its_drafts(capsys):
    assert main(["generate", "--lossless", "--draft-tokens", "3", "--json", "--max-new-tokens", "16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passes"]["verify"] + found["accepted"] == 15
    assert 0 < found["acceptance"] <= 1


def test_bench_goes_on_with_the_same_texts_by_all_rows(tmp_path, capsys):
    file = tmp_path / "rows.json"
    how = ["--model", "zoo:stories", "--no-compiled", "--texts", "2", "--prompt-tokens", "24", "--new-tokens", "16"]
    assert main(["bench", "--lossless", "--draft-tokens", "4", *how, "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    rows = {row["row"]: row for row in data["rows"]}
    assert list(rows) == ["dense eager", "lossless eager", "prompt lookup (transformers)"]
    assert rows["dense eager"]["speed_up"] == 1
    ours = rows["lossless eager"]
    assert ours["same_texts"] == ours["texts"] == 2 and len(ours["accepted_by_place"]) == 4
    assert 1 < ours["tokens_per_round"] <= 5 and 0 < ours["acceptance"] <= 1
    assert rows["dense eager"]["tokens_per_round"] is None
    assert "lossless eager" in capsys.readouterr().out


def test_an_assistant_has_a_row_of_its_own():
    model, tokenizer = zoo.load("stories")
    texts = prompts(model, tokenizer, None, 1, 16)
    rows = LosslessBench(model, PopConfig(lossless=True), 8, compiled=False, assistant=model).run(texts)
    assert rows[-1].row == "assistant (transformers)" and rows[-1].same_texts == 1


def test_prompts_from_texts_and_questions(tmp_path):
    model, tokenizer = zoo.load("stories")
    text, questions = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("Once upon a time there was a cat. " * 20)
    questions.write_text('{"question": "Who is Lily?"}\n{"prompt": "Once upon"}\n{"other": 1}\n')
    found = prompts(model, tokenizer, text, 3, 12)
    assert [own["input_ids"].shape for own in found] == [torch.Size([1, 12])] * 3
    assert len(prompts(model, tokenizer, questions, 2, 12)) == 2
    with pytest.raises(ValueError, match="question, prompt, text"):
        prompts(model, tokenizer, questions, 3, 12)
    with pytest.raises(ValueError, match="holds no text of 5000 tokens"):
        prompts(model, tokenizer, text, 3, 5000)


def test_random_weights_replay_an_acceptance(tmp_path):
    file = tmp_path / "rows.json"
    how = ["--shape", "dense-2k", "--tiny", "--no-compiled", "--texts", "2", "--prompt-tokens", "8"]
    draft = ["--draft-tokens", "4", "--replay", "1", "--new-tokens", "21"]
    assert main(["bench", "--lossless", *how, *draft, "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    assert [row["row"] for row in data["rows"]] == ["dense eager", "lossless eager"]
    assert data["rows"][1]["tokens_per_round"] == 5 and "random weights" in data["settings"]["title"]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["bench", "--lossless", "--shape", "dense-2k"], "give --model"),
        (["bench", "--lossless", "--shape", "dense-2k", "--replay", "1.5"], "from 0 to 1"),
        (["bench", "--lossless", "--model", "zoo:stories", "--texts", "1"], "2 or more"),
        (["generate", "--draft-tokens", "4"], "belongs to lossless"),
        (["generate", "--lossless", "--weights", "replace"], "whole model"),
    ],
)
def test_wrong_options_are_refused_at_once(arguments, told, capsys):
    assert main(arguments) == 2
    assert told in " ".join(capsys.readouterr().err.split())

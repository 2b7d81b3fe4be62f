"""Texts for ``popmm eval``: separate ones, and one undivided text read in windows."""

import json

import pytest
import torch

from popmm import zoo
from popmm.cli import main
from popmm.evaluation import texts as own
from popmm.evaluation.texts import text_cases, windows

WORDS = "The cat sat on the mat.\nThen a dog came in, and they played in the garden all day. "


@pytest.fixture(scope="module")
def stories():
    return zoo.load("stories")


def cases(stories, file, **changes):
    how = dict(start=0.0, context=12, continuation=8, subsets=2, per_subset=2, calibration=1)
    return text_cases(*stories, file, **{**how, **changes})


def test_windows_are_consecutive_disjoint_and_begin_as_texts_do(stories):
    _, tokenizer = stories
    text = WORDS * 30
    found = windows(tokenizer, text, 20, 1000, "cpu")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(found) == len(ids) // 19 and all(len(window) == 20 for window in found)
    assert all(window[0] == tokenizer.bos_token_id for window in found)
    assert torch.cat([window[1:] for window in found]).tolist() == ids[: 19 * len(found)]
    assert len(windows(tokenizer, text, 20, 3, "cpu")) == 3


def test_windows_of_a_tokenizer_without_a_first_token_are_text_alone():
    tokenizer = zoo.load("shapes")[1].tokenizer
    text = "Row one: a blue circle in column one. " * 20
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = windows(tokenizer, text, 10, 1000, "cpu")
    assert torch.cat(found).tolist() == ids[: 10 * (len(ids) // 10)]


@pytest.mark.parametrize("text", [WORDS * 20, WORDS.replace("\n", " ") * 20, "x" * 500, "\n" * 70 + "a b"])
def test_pieces_of_a_long_text_are_the_whole_text(monkeypatch, text):
    monkeypatch.setattr(own, "PIECE", 100)
    pieces = list(own._pieces(text))
    assert "".join(pieces) == text and all(0 < len(piece) <= 100 for piece in pieces)


def test_an_ordinary_text_becomes_cases_and_others_to_calibrate_on(stories, tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(WORDS * 30)
    subsets, calibration = cases(stories, file)
    ids = stories[1](WORDS * 30, add_special_tokens=False)["input_ids"]
    assert [len(subset) for subset in subsets] == [2, 2] and len(calibration) == 1
    case = subsets[1][0]
    assert case.inputs["input_ids"][0, 1:].tolist() == ids[38:49] and case.tokens.tolist() == ids[49:57]
    assert calibration[0].tokens.tolist() == ids[4 * 19 + 11 : 5 * 19]


def test_start_skips_a_share_of_an_ordinary_text_and_calibrates_before_it(stories, tmp_path):
    file = tmp_path / "book.txt"
    first, second = "one two three. " * 60, "Four five six. " * 60
    file.write_text((first + second).strip())
    decode = stories[1].decode
    subsets, calibration = cases(stories, file, start=0.5)
    assert "one" not in decode(subsets[0][0].inputs["input_ids"][0])
    assert "Four" not in decode(calibration[0].inputs["input_ids"][0])


def test_without_a_number_as_many_texts_are_taken_as_there_are(stories, tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(WORDS * 10)
    there = len(windows(stories[1], (WORDS * 10).strip(), 20, 1000, "cpu"))
    subsets, _ = cases(stories, file, per_subset=None)
    assert [len(subset) for subset in subsets] == [there // 2] * 2


def test_separated_texts_are_taken_one_by_one(stories, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("<|endoftext|>".join(f"{name} {WORDS}" for name in ("Ann", "Bob", "Cas", "Dan")) + "<|endoftext|>")
    subsets, calibration = cases(stories, file)
    starts = [stories[1].decode(c.inputs["input_ids"][0], skip_special_tokens=True)[:3] for s in subsets for c in s]
    assert starts == ["Ann", "Bob", "Cas", "Dan"] and calibration == []


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "book.txt is empty: give a text"),
        (b"\xff\xfe\x00", "book.txt is no UTF-8 text"),
        (b"Too short.", "0 windows of 20 tokens, but 2 subsets of 2 need 4: give a longer file"),
        (b"a<|endoftext|>b", "0 texts of at least 20 tokens, but 2 subsets of 2 need 4"),
    ],
)
def test_texts_that_do_not_do_are_named(stories, tmp_path, content, message):
    (tmp_path / "book.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        cases(stories, tmp_path / "book.txt")


def test_eval_takes_an_ordinary_text_and_shows_how_far_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    monkeypatch.setenv("COLUMNS", "120")
    file = tmp_path / "book.txt"
    file.write_text(WORDS * 30)
    arguments = ["--text", str(file), "--ratios", "0.2", "--methods", "gate, 4 bit, mask"]
    assert main(["eval", *arguments, "--context", "12", "--continuation", "12", "--subsets", "2"]) == 0
    out, err = capsys.readouterr()
    methods = [line.split(" | ")[0] for line in out.splitlines() if line.startswith("|")]
    assert methods == ["| method", "|---|---|---|---|---|---|---|---|", "| dense", "| gate, 4 bit", "| mask"]
    assert "evaluating" in err and "the dense model's own texts" in err


def test_questions_are_prompts_and_their_answers_are_decoded(stories, tmp_path):
    _, tokenizer = stories
    asked = [(f"Who is Lily, number {i}?", f"Lily is a little girl who has {i} red balls.") for i in range(6)]
    asked.insert(1, ("Who?", "Tom"))  # too short to decode
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in asked))
    subsets, calibration = cases(stories, file)
    found = [case for subset in (*subsets, calibration) for case in subset]
    expected = [pair for pair in asked if pair[0] != "Who?"][: len(found)]
    assert [len(subset) for subset in (*subsets, calibration)][:2] == [2, 2]
    for case, (question, answer) in zip(found, expected):
        assert case.inputs["input_ids"][0].tolist() == tokenizer(question)["input_ids"]
        assert case.tokens.tolist() == tokenizer(answer, add_special_tokens=False)["input_ids"][:8]
    file.write_text('{"question": "Who is Lily?"}')
    with pytest.raises(ValueError, match="each line is to have an answer too"):
        cases(stories, file)
    with pytest.raises(ValueError, match="questions are read from the first on"):
        cases(stories, file, start=0.5)

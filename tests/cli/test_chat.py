"""Conversations about pictures: kept caches, commands, and input that people get wrong."""

import io
import random
import subprocess
import sys

import pytest
from PIL import Image
from rich.console import Console

import popmm
from popmm import zoo
from popmm.cli import main
from popmm.cli.chat import Chat
from popmm.cli.images import open_image
from popmm.conversation import Conversation
from popmm.zoo import shapes

CONFIG = popmm.PopConfig(pruning_ratio=0.2)


@pytest.fixture(scope="module")
def loaded():
    return zoo.load("shapes")


@pytest.fixture
def talk(loaded):
    conversation = Conversation(*loaded, CONFIG)
    yield conversation
    conversation.close()


@pytest.fixture
def room(talk):
    return Chat(talk, Console(file=io.StringIO(), width=200), CONFIG)


def said(room):
    return room.console.file.getvalue()


def picture():
    return open_image(zoo.picture())[0]


def modality_counts(talk):
    return {k: int(v) for k, v in next(iter(talk.state.layers.values())).tokens_by_modality.items()}


def test_bundled_picture_is_the_scene_it_says():
    assert picture().tobytes() == shapes.draw(shapes.bundled_scene()).tobytes()


@pytest.mark.parametrize("config", [None, popmm.PopConfig(pruning_ratio=0.0), CONFIG])
def test_answers_about_the_bundled_picture_are_right(loaded, config):
    talk = Conversation(*loaded, config)
    right = 0
    for seed in range(3):
        for question in shapes.questions(shapes.bundled_scene(), random.Random(seed)):
            talk.reset()
            talk.show(picture())
            right += talk.ask(question.text).text == question.answer
    talk.close()
    assert right >= 14


def test_a_follow_up_is_read_on_the_kept_cache(talk):
    talk.show(picture())
    assert talk.ask("Describe the picture.").read_again
    before = modality_counts(talk)
    assert before["image"] == 16
    answer = talk.ask("How many shapes are there?")
    assert not answer.read_again
    after = modality_counts(talk)
    assert after["image"] == 16 and before["text"] < after["text"] < before["text"] + 20


def test_a_follow_up_dense_answers_as_the_whole_conversation_does(loaded):
    talk = Conversation(*loaded, popmm.PopConfig(pruning_ratio=0.0))
    talk.show(picture())
    talk.ask("Describe the picture.")
    kept = talk.ask("How many shapes are there?")
    talk.messages = talk.messages[:-2]
    talk._forget_cache()
    again = talk.ask("How many shapes are there?")
    talk.close()
    assert (kept.read_again, again.read_again) == (False, True)
    assert kept.text == again.text


def test_new_pictures_and_ratios_have_everything_read_again(talk):
    talk.show(picture())
    talk.ask("Describe the picture.")
    talk.show(picture())
    assert talk.ask("Describe the picture.").read_again
    assert modality_counts(talk)["image"] == 32
    talk.config = CONFIG.replace(pruning_ratio=0.1)
    assert talk.ask("How many shapes are there?").read_again
    assert modality_counts(talk)["image"] == 32


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failed_question_is_taken_back(talk, monkeypatch, error):
    talk.show(picture())
    talk.ask("Describe the picture.")
    messages = list(talk.messages)
    expected = Conversation.ask

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("popmm.conversation.clocked_generate", fail)
    with pytest.raises(type(error)):
        expected(talk, "How many shapes are there?")
    monkeypatch.undo()
    assert talk.messages == messages
    assert talk.ask("How many shapes are there?").read_again


def test_commands(room, talk):
    room.take(f"/image {zoo.picture()}")
    room.take("How many shapes are there?")
    room.take("/stats")
    assert "112 x 112 pixels; ask about it" in said(room)
    assert "partitioned from 16 image + " in said(room) and "tokens/s" in said(room)
    room.take("/ratio 0.1")
    assert talk.state.config.pruning_ratio == 0.1 and "pruning_ratio 0.1, gate: reads" in said(room)
    room.take("/bytes 0.5")
    assert talk.state.config.bytes == 0.5 and "bytes 0.5, tiers: reads" in said(room)
    room.take("/ratio 0.1")
    room.take("/ratio 0")
    assert talk.state.bytes_per_token()[0] == talk.state.bytes_per_token()[1]
    room.take("/reset")
    assert not talk.messages and room.last is None
    room.run(["/quit", "/nonsense"])
    assert "/nonsense" not in said(room)


@pytest.mark.parametrize(
    "line, message",
    [
        ("/image", "/image PATH: name a file"),
        ("/image missing.png", "there is no file missing.png"),
        ("/image http://127.0.0.1:9/p.png", "cannot be reached"),
        ("/bytes", "/bytes : give a share in (0, 1], such as 0.25"),
        ("/ratio", "/ratio : give a number in [0, 1), such as 0.3"),
        ("/ratio much", "/ratio much: give a number"),
        ("/ratio 1.5", "pruning_ratio=1.5 is not a ratio"),
        ("/ratio 0.9", "pruning_ratio=0.9 would prune"),
        ("/nonsense", "there is no command /nonsense: /image, /bytes, /ratio, /stats, /reset, /help, /quit"),
    ],
)
def test_bad_lines_get_one_line_and_the_chat_goes_on(room, talk, line, message):
    room.take(line)
    assert message in said(room) and said(room).count("\n") == 1
    assert talk.state.config == CONFIG
    room.take(f"/image {zoo.picture()}")
    room.take("How many shapes are there?")
    assert room.last is not None


def test_interrupted_answers_are_taken_back(room, talk, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("popmm.conversation.clocked_generate", interrupt)
    room.take("How many shapes are there?")
    assert "interrupted" in said(room) and not talk.messages


def test_a_one_pixel_picture_in_the_chat(room, tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    room.take(f"/image {tmp_path / 'dot.png'}")
    assert "has 1 x 1 pixels" in said(room)


def test_text_models_refuse_pictures_and_need_a_template(talk):
    model, tokenizer = zoo.load("stories")
    text = Conversation(model, tokenizer, CONFIG)
    with pytest.raises(ValueError, match="reads text alone"):
        text.show(picture())
    with pytest.raises(ValueError, match="no chat template: give an instruction-tuned model"):
        text.ask("Hello?")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    text.generation["max_new_tokens"] = 4
    assert text.ask("Hello?").n_tokens == 4
    assert text.ask("And now?").n_tokens == 4
    text.close()


def test_a_picture_that_fails_a_question_is_dropped(room, talk, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no such shape")

    room.take(f"/image '{zoo.picture()}'")
    with monkeypatch.context() as patch:
        patch.setattr("popmm.conversation.clocked_generate", fail)
        room.take("Describe the picture.")
    assert "no such shape (the new picture is dropped)" in said(room)
    room.take("Hello.")
    assert room.last is not None and modality_counts(talk).keys() == {"text"}


def test_models_without_a_template_are_refused_at_once(capsys):
    assert main(["chat", "--model", "zoo:stories"]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert main(["inspect", "--model", "zoo:stories", "--image", str(zoo.picture())]) == 2
    assert "reads text alone" in capsys.readouterr().err


def test_closing_detaches(loaded):
    talk = Conversation(*loaded, CONFIG)
    talk.close()
    with pytest.raises(RuntimeError, match="is not attached"):
        popmm.detach(loaded[0])


def test_chat_command_with_piped_lines(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Describe the picture.\n\n/image nowhere.png\n/stats\n/quit\n"))
    assert main(["chat", "--pruning-ratio", "0.2", "--max-new-tokens", "40"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Row ") and len(out.splitlines()) == 1  # answers alone
    assert "there is no file nowhere.png" in err and "16 image" in err
    [layers] = [line for line in err.splitlines() if "language_model.layers." in line]
    assert "0-3" in layers and "(4)" in layers  # one line for equal rows


@pytest.mark.parametrize("how", [["--ffn-ratio", "0.3"], ["--bytes", "0.3"]])
def test_chat_has_its_own_ratio_only_where_none_is_given(how, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Describe the picture.\n/stats\n/ratio 0.1\n/quit\n"))
    assert main(["chat", *how, "--max-new-tokens", "20"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Row ") and "pruning_ratio 0.1, " in err and ": reads" in err
    assert f"selection={'tiers' if how[0] == '--bytes' else 'gate'}" in err


def test_inspect_draws_the_overlap_of_modalities(tmp_path, capsys):
    file = tmp_path / "overlap.png"
    assert main(["inspect", "--model", "zoo:shapes", "--image", str(zoo.picture()), "--out", str(file)]) == 0
    assert Image.open(file).size[0] > 500
    assert main(["inspect", "--model", "zoo:shapes", "--image", "nowhere.png", "--out", str(file)]) == 2
    assert "there is no file nowhere.png" in capsys.readouterr().err


def test_example_answers_about_the_bundled_picture():
    command = [sys.executable, "examples/chat_image.py"]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stderr
    answers = [line.split(":", 1)[1].strip() for line in run.stdout.splitlines() if line.startswith("  ")]
    [description] = shapes.questions(shapes.bundled_scene(), random.Random(0), kinds=("describe",))
    assert answers == [description.answer] * 2 + ["There are four shapes."] * 2

"""``popmm serve`` where requests are answered one after the other: pictures, and settings that look at a prompt."""

import base64
import io
import json

import openai
import pytest
import torch
from PIL import Image
from served import PROMPTS, alone, client, complete, figures, serving, stories, text_of, until

import popmm
from popmm import zoo
from popmm.cli import main
from popmm.serving import server as server_module
from popmm.serving.limits import Limits
from popmm.zoo.encoding import chat_inputs
from popmm.zoo.loading import load_model

QUESTION = "What is in the picture?"


def shapes():
    return load_model("zoo:shapes")


@pytest.fixture(scope="module")
def looking():
    """A server of the bundled model that looks at pictures."""
    with pytest.warns(UserWarning, match="one after the other: transformers batches no Qwen2VL"):
        with serving(popmm.PopConfig(), Limits(grace=5), load=shapes, name="zoo:shapes") as server:
            yield server


def as_url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def about(url, **settings):
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": parts}]
    return dict(model="zoo:shapes", messages=messages, temperature=0, max_tokens=12, **settings)


def test_a_picture_is_looked_at(looking):
    asked = about(as_url(zoo.picture().read_bytes()))
    answer = client(looking).chat.completions.create(**asked).choices[0].message.content
    chunks = client(looking).chat.completions.create(stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    model, processor = zoo.load("shapes")
    parts = [{"type": "image", "image": Image.open(zoo.picture()).convert("RGB")}, {"type": "text", "text": QUESTION}]
    inputs = chat_inputs(processor, [{"role": "user", "content": parts}], "cpu")
    with popmm.pruned(model):
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.decode(ids, skip_special_tokens=True)


def test_pictures_that_cannot_be_looked_at_are_refused(looking, tmp_path):
    whole = zoo.picture().read_bytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "own.png")
    bad = {
        "damaged": as_url(whole[: len(whole) // 2]),
        "damaged or too large": as_url(b"no picture"),
        "give the picture itself": str(tmp_path / "own.png"),
        "the picture itself, as data": "http://127.0.0.1/picture.png",
    }
    for message, url in bad.items():
        with pytest.raises(openai.BadRequestError, match=message):
            client(looking).chat.completions.create(**about(url))
    assert client(looking).chat.completions.create(**about(as_url(whole))).choices[0].message.content


def test_what_a_picture_becomes_in_bytes_is_limited(looking):
    kept, looking.gate._limits = looking.gate._limits, Limits(megabytes=0.05)
    try:
        noise = Image.fromarray(torch.randint(256, (300, 300, 3), dtype=torch.uint8, device="cpu").numpy())
        noise.save(data := io.BytesIO(), "png")
        with pytest.raises(openai.APIStatusError, match="larger than 0.05 MB"):
            client(looking).chat.completions.create(**about(as_url(data.getvalue())))
    finally:
        looking.gate._limits = kept


@pytest.fixture(scope="module")
def lossless():
    config = popmm.PopConfig(lossless=True, draft_tokens=3)
    with pytest.warns(UserWarning, match="lossless decoding drafts for one sequence"):
        with serving(config, Limits(grace=5, waiting=8)) as server:
            yield server


def test_lossless_text_is_the_models_own(lossless):
    model, tokenizer = stories()
    expected = alone(model, tokenizer, PROMPTS[8], 24)
    assert complete(lossless, PROMPTS[8], 24).choices[0].text == expected
    assert text_of(complete(lossless, PROMPTS[8], 24, stream=True)) == expected
    assert lossless.state.passes.drafted > 0


def test_who_goes_away_has_generate_stop(lossless):
    before = figures(lossless)
    chunks = complete(lossless, PROMPTS[0], 450, stream=True)
    next(iter(chunks))
    with pytest.raises(openai.APITimeoutError):  # while it waits
        client(lossless, timeout=0.2).completions.create(model="tales", prompt="One day", max_tokens=450)
    chunks.close()
    until(lambda: not lossless.gate.inside and not lossless.engine.running and not lossless.engine._streamers)
    name = ("popmm_generated_tokens_total",)
    assert figures(lossless)[name] - before[name] < 900


def test_a_stop_ends_the_text(lossless):
    text = complete(lossless, PROMPTS[8], 60, stop=["."]).choices[0].text
    assert text.count(".") == 1 and text.endswith(".")


def test_settings_that_one_prompt_decides_are_not_batched():
    limits = Limits()
    with pytest.raises(ValueError, match="selection='mask' partitions by one prompt"):
        server_module.Server("tales", stories, popmm.PopConfig.paper(), limits, together=True)
    with pytest.raises(ValueError, match="Qwen2VL"):
        server_module.Server("zoo:shapes", shapes, popmm.PopConfig(), limits, together=True)


def test_the_command(monkeypatch, capsys):
    made = []

    class Recorded(server_module.Server):
        def run(self, started):
            made.append(self)
            started()
            self.close()

    monkeypatch.setattr(server_module, "Server", Recorded)
    asked = ["serve", "zoo:stories", "--bytes", "0.25", "--max-running", "3", "--max-waiting", "2", "--port", "0"]
    assert main(asked) == 0
    [server] = made
    assert server.state.config.bytes == 0.25 and server.state.config.statistics == "weights"
    assert server.gate._most == 5 and server.models.force_model == "zoo:stories"
    assert "up to 3 sequences at once" in capsys.readouterr().err
    assert main(["serve", "zoo:stories", "--statistics", "prompt", "--port", "0"]) == 0
    assert made[1].state.config.statistics == "prompt" and not made[1].engine.batches
    assert "one request after the other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-running", "0"], "running=0: give a number of 1 or more"),
        (["--max-seconds", "-1"], "seconds=-1.0"),
        (["--port", "70000"], "--port 70000"),
        (["--statistics", "prompt", "--continuous-batching"], "is of one prompt"),
        (["--cache-tokens", "3"], "cache_tokens=3"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message, capsys):
    assert main(["serve", "zoo:stories", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("popmm.serving.NEEDED", ("fastapi", "no_such_package"))
    assert main(["serve", "zoo:stories"]) == 2
    assert "needs no_such_package: pip install 'popmm[serve]'" in capsys.readouterr().err


def test_errors_have_openais_form(looking):
    with pytest.raises(openai.BadRequestError) as error:
        client(looking).chat.completions.create(model="zoo:shapes", messages=[])
    body = json.loads(error.value.response.text)["error"]
    assert body["type"] == "invalid_request_error" and body["code"] == 400 and "messages" in body["message"]

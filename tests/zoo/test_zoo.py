"""The bundled models are trained models, and pruning on them behaves as on trained models."""

import json
import sys

import pytest
import torch

import popmm
from popmm import zoo
from popmm.evaluation.evaluate import Wanted, evaluate
from popmm.evaluation.texts import cases_of
from popmm.zoo import bundled as room
from popmm.zoo import train_stories

# written for this test; neither in the training text nor by a model
STORIES = [
    "Once upon a time there was a small bear who lived in the woods. He liked honey very much. One day he found a big "
    "tree full of bees. The bear was afraid of the bees, but he was also very hungry. He asked his friend the bird for "
    'help. The bird said, "I can fly up and get some honey for you." The bear was happy and said thank you. They ate '
    "the honey together and played all day. Then the sun went down, and the bear and the bird went home to sleep.",
    "Sara and her brother Tim went to the beach with their mom. They had a red bucket and a blue shovel. They wanted "
    "to make a big castle in the sand. Tim put water in the bucket and Sara made a tall tower. A big wave came and "
    'the castle was gone. Tim was sad and started to cry. Mom gave him a hug and said, "It is okay. We can make a '
    'new one." They worked together and made a better castle. They all smiled and had fun until it was time to go.',
    "There was a little car that was very slow. All the other cars laughed at him. The little car wanted to be fast. "
    "One day it rained and rained, and the road was full of mud. The fast cars could not stop and they got stuck. The "
    "little car went slowly and did not get stuck. He helped the other cars to come out of the mud. They said sorry "
    "and thank you. From that day on, the cars were all friends, and no one laughed at the little car again.",
]


@pytest.fixture(params=["stories", "stories-moe"], scope="module")
def bundled(request):
    return zoo.load(request.param)


def encoded(tokenizer):
    return [torch.tensor(tokenizer(story)["input_ids"]) for story in STORIES]


def test_names_and_unknown_name():
    assert zoo.names() == ["shapes", "stories", "stories-moe"]
    with pytest.raises(ValueError, match="no bundled model is called 'story': there are 'shapes', 'stories'"):
        zoo.load("story")


def test_files_are_small_and_half_precision():
    for name in zoo.names():
        weights = zoo.path(name) / "model.safetensors"
        assert weights.stat().st_size < 16 * 2**20
        assert json.loads((zoo.path(name) / "config.json").read_text())["dtype"] == "float16"


def test_bundled_model_has_learnt_its_language(bundled):
    model, tokenizer = bundled
    losses = []
    for ids in encoded(tokenizer):
        with torch.no_grad():
            losses.append(model(ids[None], labels=ids[None]).loss.item())
    assert torch.tensor(losses).mean().exp() < 25  # of a vocabulary of 1,024


def test_ffns_are_wide(bundled):
    model, _ = bundled
    config = model.config
    experts = getattr(config, "num_local_experts", 1)
    assert config.intermediate_size * experts >= 4 * config.hidden_size
    assert experts == 1 or experts >= 8


def test_ratio_zero_generates_the_dense_text(bundled):
    model, tokenizer = bundled
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    dense = model.generate(**inputs, max_new_tokens=20)
    with popmm.pruned(model, pruning_ratio=0.0):
        assert torch.equal(model.generate(**inputs, max_new_tokens=20), dense)


def test_methods_rank_as_on_trained_models(bundled):
    model, tokenizer = bundled
    cases = cases_of(encoded(tokenizer), context=40)
    names = ["random", "prompt mask", "mask", "gate, 16 bit", "gate"]
    rows = evaluate(model, [cases], [Wanted(name, bytes_share=0.7) for name in names], popmm.PopConfig())
    kl = {row.method: row.kl for row in rows}
    assert kl["random"] > kl["prompt mask"] > kl["mask"] > kl["gate, 16 bit"] > kl["gate"] > 0
    assert kl["gate"] < kl["mask"] / 4


def test_router_of_the_bundled_experts_is_balanced():
    model, tokenizer = zoo.load("stories-moe")
    with popmm.pruned(model) as state:
        counts = []
        for ids in encoded(tokenizer):
            with torch.no_grad():
                model(ids[None])
            counts.append(torch.stack([p.tokens for p in state.layers.values()]))
    load = torch.stack(counts).sum(0).float()
    load = load / load.sum(1, keepdim=True)
    assert (load > 0.02).all() and (load < 0.4).all()


@pytest.mark.slow
def test_training_script_writes_a_model_that_loads(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(f"{story} ({i})" for i in range(12) for story in STORIES))
    for form in ("dense", "moe"):
        out = tmp_path / form
        arguments = [str(text), "--form", form, "--out", str(out), "--epochs", "0.2", "--vocab-size", "300"]
        monkeypatch.setattr(sys, "argv", ["train_stories", *arguments])
        train_stories.main()
        record = json.loads((out / "training.json").read_text())
        assert record["held_out_stories"] == 2 and record["held_out_perplexity"] > 1
        monkeypatch.setattr(room, "_ROOM", tmp_path)
        model, tokenizer = zoo.load(form)
        output = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=3)
        assert output.shape[1] > 3


def test_training_holds_out_the_last_twentieth(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(f"story {i}" for i in range(40)))
    training, held_out = train_stories.read_stories(text)
    assert training[-1] == "story 37" and held_out == ["story 38", "story 39"]

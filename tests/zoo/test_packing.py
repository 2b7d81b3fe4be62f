"""Conversations packed in a row are computed as they are alone."""

from __future__ import annotations

import random

import pytest
import torch

from popmm import zoo
from popmm.evaluation.answers import FIRST_SEED, SEED_STRIDE, held_out_questions, is_exact
from popmm.zoo import shapes, train_shapes
from popmm.zoo.packing import Packer

HELLO = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]


@pytest.fixture(scope="module")
def loaded():
    model, processor = zoo.load("shapes")
    return model, processor, Packer(processor, shapes.GRID)


def about(seed: int) -> tuple[shapes.Scene, list[list[dict]]]:
    generator = random.Random(seed)
    scene = shapes.random_scene(generator)
    return scene, [*train_shapes.talks_about(scene, generator), HELLO]


@pytest.mark.parametrize("seed", range(3))
def test_packed_conversations_lose_what_they_lose_alone(loaded, seed):
    model, processor, packer = loaded
    scene, talks = about(seed)
    [features] = train_shapes.features_of(model, packer, [scene])
    rows = packer.rows(talks, train_shapes.LENGTH)
    assert len(rows) < len(talks) == sum(row.owners[-1] for row in rows)
    with torch.no_grad():
        packed = train_shapes.token_losses(model, packer, [(row, features) for row in rows])[0]
        alone = []
        for talk in talks:
            text = processor.apply_chat_template(talk, tokenize=False)
            shown = [shapes.draw(scene)] if "<|image_pad|>" in text else None
            inputs = processor(text=[text], images=shown, return_tensors="pt")
            [row] = packer.rows([talk], train_shapes.LENGTH)
            said = [at for at, learned in enumerate(row.learned) if learned]
            own = [at - len(row.ids) for at in said]  # a row also holds the picture that HELLO does not see
            logits, ids = model(**inputs).logits[0], inputs["input_ids"][0]
            before = [at - 1 for at in own]
            alone += torch.nn.functional.cross_entropy(logits[before], ids[own], reduction="none").tolist()
    # bfloat16 products: compared as sorted, since rows order conversations by length
    torch.testing.assert_close(packed.sort()[0], torch.tensor(sorted(alone)), atol=0.05, rtol=0.1)


def test_the_assistants_words_and_their_ends_are_learned(loaded):
    _, processor, packer = loaded
    _, talks = about(4)
    rows = packer.rows(talks, train_shapes.LENGTH)
    labels = packer.batch(rows, train_shapes.LENGTH)["labels"]
    learned = processor.tokenizer.decode(labels[labels != -100]).split("<|im_end|>")[:-1]
    said = [turn["content"] for talk in talks for turn in talk[1::2]]
    assert sorted(learned) == sorted(words if isinstance(words, str) else words[0]["text"] for words in said)


def test_conversations_that_are_too_long_are_left_out(loaded):
    _, _, packer = loaded
    _, talks = about(5)
    assert packer.rows(talks, 22) == []


def test_held_out_answers_are_judged_as_the_evaluation_judges_them(loaded):
    model, processor, packer = loaded
    apart, asked = divmod(train_shapes.HELD_OUT_SEED - FIRST_SEED, SEED_STRIDE)
    assert asked == 0
    exact = [is_exact(model, question, None) for question in held_out_questions(processor, "cpu", apart, 4)]
    judged = train_shapes.HeldOut(model, packer, 4).judge(model)[1]["all"]
    assert judged == pytest.approx(sum(exact) / len(exact), abs=1.5 / len(exact))  # bfloat16 products may turn one

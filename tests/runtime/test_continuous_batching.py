"""``generate_batch`` on an attached model: prompts dense, decode tokens pruned, to each sequence its own answer."""

import pytest
import tiny
import torch
from matrix import MODELS
from transformers import ContinuousBatchingConfig, GenerationConfig

import popmm

PROMPTS = [tiny.prompt(4 + i % 5, seed=i)[0].tolist() for i in range(16)]
STATELESS = dict(statistics="weights", bytes=0.3)


def room(tokens):
    """So many in one pass, and a cache for these models: by itself it takes most of the machine's memory."""
    return ContinuousBatchingConfig(max_batch_tokens=tokens, num_blocks=32)


def answers(model, prompts, new=7):
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=room(128))
    return [found[key].generated_tokens for key in sorted(found, key=lambda key: int(key.split("_")[-1]))]


def alone(model, prompt, new=7):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["llama", "starcoder2", "qwen3-moe"])
def test_at_ratio_zero_each_gets_what_it_gets_alone(name):
    model = MODELS[name].build(torch.float64)  # where sums in another order choose the same tokens
    model.set_experts_implementation("eager")
    expected = [alone(model, prompt) for prompt in PROMPTS]
    with popmm.pruned(model, statistics="weights", ffn_ratio=0.0):
        assert answers(model, PROMPTS) == expected
    assert answers(model, PROMPTS[:4]) == expected[:4]


@pytest.mark.parametrize("name", ["llama", "starcoder2", "qwen3-moe"])
def test_decode_tokens_are_pruned(name):
    model = MODELS[name].build()
    with popmm.pruned(model, **STATELESS) as state:
        found = answers(model, PROMPTS)
        assert [len(own) for own in found] == [7] * len(PROMPTS)
        assert state.passes["decode"] >= 6 and state.passes["dense"] == 0 and state.passes["prompt"] > 0


def test_one_sequence_gets_what_generate_gives():
    model = MODELS["llama"].build()
    with popmm.pruned(model, **STATELESS):
        for prompt in PROMPTS[:3]:
            assert answers(model, [prompt])[0] == alone(model, prompt)


@pytest.mark.parametrize("name", ["llama", "starcoder2", "qwen3-moe"])
def test_a_pass_of_prompts_and_decode_steps(name):
    """Each token as it would be in a pass of its own kind."""
    model = MODELS[name].build()
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    few = room(12)  # prompts come in while others decode
    with popmm.pruned(model, **STATELESS) as state:
        seen = []
        many = state._runner.kinds.many

        def noting(*args):
            seen.append((bool(args[4].any()), args[5]))
            return many(*args)

        state._runner.kinds.many = noting
        found = model.generate_batch(PROMPTS, generation_config=config, continuous_batching_config=few)
        assert len(found) == len(PROMPTS) and all(len(own.generated_tokens) == 6 for own in found.values())
        assert (True, False) in seen and (True, True) in seen


def test_selections_by_a_prompt_are_refused_with_what_works():
    model = MODELS["llama"].build()
    for settings in (dict(bytes=0.3), dict(selection="mask", ffn_ratio=0.4)):
        with popmm.pruned(model, **settings), pytest.raises(RuntimeError, match="statistics='weights'"):
            answers(model, PROMPTS[:2])

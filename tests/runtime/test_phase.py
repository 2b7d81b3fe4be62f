"""Which pass is a prompt, which tokens count, and whose statistics a decode step uses."""

import copy

import independent
import pytest
import tiny
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache

import popmm
from popmm.compat import compiled_anywhere
from popmm.runtime.padding import counted_tokens

BUDGET = 48
CONFIG = popmm.PopConfig(ffn_ratio=0.4, selection="mask")


def expected(model, *prompts):
    return independent.prompt_partitions(model, list(prompts), BUDGET)


def found(state):
    return [independent.channels(p) for p in state.layers.values()]


def generate(model, ids, new=4, **settings):
    return model.generate(ids, max_new_tokens=new, do_sample=False, **settings)


def left_padded(*prompts):
    """(input_ids, attention_mask) of a left-padded batch."""
    width = max(len(p) for p in prompts)
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts])
    return ids, mask


ARCHITECTURES = ["llama", "mistral-sliding", "gemma3", "gemma2"]
CACHES = ["dynamic", "static"]
# gemma2 has no sdpa in transformers
ATTENTIONS = [(name, a) for name in ARCHITECTURES for a in ("sdpa", "eager") if (name, a) != ("gemma2", "sdpa")]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name, attention", ATTENTIONS)
def test_left_padded_batch_has_the_pooled_partition_of_its_members(name, attention, cache):
    model = tiny.dense(name)
    model.set_attn_implementation(attention)
    short, long = tiny.prompt(5, seed=1)[0], tiny.prompt(14, seed=2)[0]
    ids, mask = left_padded(short, long)
    with popmm.pruned(model, CONFIG) as state:
        generate(model, ids, attention_mask=mask, cache_implementation=cache)
        batch = found(state)
        generate(model, ids.flip(0), attention_mask=mask.flip(0), cache_implementation=cache)
        swapped = found(state)
    assert batch == swapped == expected(model, short, long)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_one_prompt_changes_nothing(name, cache):
    model = tiny.dense(name)
    ids = tiny.prompt(9)
    padded, mask = left_padded(ids[0], tiny.prompt(14, seed=2)[0])
    with popmm.pruned(model, CONFIG) as state:
        plain = generate(model, ids, cache_implementation=cache)
        alone = found(state)
        output = generate(model, padded[:1], attention_mask=mask[:1], cache_implementation=cache)
        assert found(state) == alone == expected(model, ids[0])
    assert torch.equal(output[0, 14:], plain[0, 9:])


def test_repeating_a_prompt_in_a_batch_gives_its_own_partition(llama):
    ids = tiny.prompt(9)
    with popmm.pruned(llama, CONFIG) as state:
        generate(llama, ids.repeat(3, 1))
        assert found(state) == expected(llama, ids[0])


@pytest.mark.parametrize("cache", CACHES)
def test_one_token_prompt_is_prefill(llama, cache):
    ids = tiny.prompt(1)
    with popmm.pruned(llama, CONFIG) as state, state.trace() as trace:
        generate(llama, tiny.prompt(9, seed=4), cache_implementation=cache)
        generate(llama, ids, new=3, cache_implementation=cache)
        assert found(state) == expected(llama, ids[0])
        assert trace["model.layers.0.mlp"].shape[0] == 3 + 2


@torch.no_grad()
def test_one_token_prompt_on_a_reset_static_cache_is_prefill(llama):
    ids = tiny.prompt(1)
    cache = StaticCache(config=llama.config, max_cache_len=16)
    with popmm.pruned(llama, CONFIG) as state:
        llama(tiny.prompt(9, seed=4), past_key_values=cache)
        cache.reset()
        llama(ids, past_key_values=cache)
        assert found(state) == expected(llama, ids[0])


@pytest.mark.parametrize("cache", CACHES)
def test_new_prompt_forgets_the_old_one(llama, cache):
    first, second = tiny.prompt(9, seed=1), tiny.prompt(7, seed=2)
    with popmm.pruned(llama, CONFIG) as state:
        generate(llama, first, cache_implementation=cache)
        generate(llama, second, cache_implementation=cache)
        assert found(state) == expected(llama, second[0])


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma3"])
def test_chunked_prefill_has_the_partition_of_the_whole_prompt(name):
    model = tiny.dense(name)
    ids = tiny.prompt(13)
    with popmm.pruned(model, CONFIG) as state:
        generate(model, ids, prefill_chunk_size=4)
        assert found(state) == expected(model, ids[0])


@torch.no_grad()
def test_one_more_token_on_a_read_prompt_is_decode(llama):
    ids = tiny.prompt(9)
    with popmm.pruned(llama, CONFIG) as state:
        cache = llama(ids[:, :8]).past_key_values
        with state.trace() as trace:
            llama(ids[:, 8:], past_key_values=cache)
        assert len(trace) == 2
        assert found(state) == expected(llama, ids[0, :8])


@pytest.mark.parametrize("shape", ["2-D", "2-D with cache", "4-D bool", "4-D additive", "dict", "block"])
def test_counted_tokens_reads_every_form_of_mask(shape):
    # two sequences, 3 tokens in the cache, 4 new ones; the second sequence is padded by 4 on the left
    padding = torch.tensor([[1] * 7, [0, 0, 0, 0, 1, 1, 1]], dtype=torch.bool)
    query, key = torch.arange(3, 7)[:, None], torch.arange(7)[None]
    square = ((key <= query) & padding[:, None, :])[:, None]
    masks = {
        "2-D": padding[:, 3:].long(),
        "2-D with cache": padding.long(),
        "4-D bool": square,
        "4-D additive": torch.zeros(square.shape).masked_fill(~square, torch.finfo(torch.float32).min),
        "dict": {"sliding_attention": None, "full_attention": square},
    }
    if shape == "block":
        masks["block"] = create_block_mask(
            lambda b, h, q, k: (k <= q + 3) & padding[b, k], B=2, H=None, Q_LEN=4, KV_LEN=7, device="cpu"
        )
    assert counted_tokens(masks[shape], (2, 4), 3).tolist() == [[True] * 4, [False, True, True, True]]


def test_counted_tokens_is_none_without_padding():
    assert counted_tokens(None, (2, 4), 0) is None
    assert counted_tokens(torch.ones(2, 4), (2, 4), 0) is None
    assert counted_tokens({"full_attention": None}, (2, 4), 0) is None


@torch.no_grad()
def test_chat_turn_on_a_kept_cache_adds_to_the_statistics(llama):
    first, second = tiny.prompt(9, seed=1), tiny.prompt(6, seed=2)
    with independent.captured(llama) as seen:
        llama(torch.cat([first, second], 1))
    with popmm.pruned(llama, CONFIG) as state:
        cache = llama(first).past_key_values
        llama(second, past_key_values=cache)
        assert found(state) == expected(llama, torch.cat([first, second], 1)[0])
    assert seen[0].shape[1] == 15


def test_generate_continues_a_chat_on_its_kept_cache(llama):
    with popmm.pruned(llama, CONFIG) as state:
        cache = DynamicCache(config=llama.config)
        turn = generate(llama, tiny.prompt(9), past_key_values=cache)
        tokens = state.layers["model.layers.0.mlp"].tokens
        following = torch.cat([turn, tiny.prompt(5, seed=3)], 1)
        generate(llama, following, past_key_values=cache)
        # the new turn, and the last token of the answer, which had not been through the model
        assert state.layers["model.layers.0.mlp"].tokens == tokens + 6


@torch.no_grad()
def test_interleaved_conversations_keep_their_own_partitions(llama):
    first, second, token = tiny.prompt(9, seed=1), tiny.prompt(7, seed=2), tiny.prompt(1, seed=3)
    with popmm.pruned(llama, CONFIG) as state:
        alone = llama(token, past_key_values=llama(first).past_key_values).logits
        cache = llama(first).past_key_values
        other = llama(second).past_key_values
        assert torch.equal(llama(token, past_key_values=cache).logits, alone)
        assert found(state) == expected(llama, first[0])
        llama(token, past_key_values=other)
        assert found(state) == expected(llama, second[0])


@torch.no_grad()
def test_copied_prompt_cache_brings_its_statistics(llama):
    prefix, first, second = tiny.prompt(9, seed=1), tiny.prompt(4, seed=2), tiny.prompt(5, seed=3)
    with popmm.pruned(llama, CONFIG) as state:
        kept = llama(prefix).past_key_values
        for question in (first, second):
            llama(question, past_key_values=copy.deepcopy(kept))
            assert found(state) == expected(llama, torch.cat([prefix, question], 1)[0])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("chunk", [4, 5, 7])
def test_chunks_that_are_all_padding_are_no_empty_prompt(llama, chunk, cache):
    ids = tiny.prompt(9)
    padded, mask = left_padded(ids[0], tiny.prompt(16, seed=2)[0])
    with popmm.pruned(llama, CONFIG) as state:
        plain = generate(llama, ids)
        settings = dict(prefill_chunk_size=chunk, cache_implementation=cache)
        output = generate(llama, padded[:1], attention_mask=mask[:1], **settings)
        assert found(state) == expected_of(llama, state, ids)
    assert torch.equal(output[0, 16:], plain[0, 9:])


@torch.no_grad()
def test_cropping_a_cache_takes_its_tokens_out_of_the_statistics(llama):
    prefix, first, second = tiny.prompt(9, seed=1), tiny.prompt(14, seed=2), tiny.prompt(5, seed=3)
    with popmm.pruned(llama, CONFIG) as state:
        cache = llama(prefix).past_key_values
        llama(first, past_key_values=cache)
        cache.crop(-14)
        llama(second, past_key_values=cache)
        assert found(state) == expected(llama, torch.cat([prefix, second], 1)[0])
        assert state.layers["model.layers.0.mlp"].tokens == 14


def test_beam_search_partitions_by_the_prompt(llama):
    ids = tiny.prompt(9)
    with popmm.pruned(llama, CONFIG) as state, state.trace() as trace:
        output = llama.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False)
        assert found(state) == expected(llama, ids[0])
        assert trace["model.layers.0.mlp"].shape[1] == 3
    assert output.shape == (1, 14)


def test_assisted_generation_with_a_pruned_target(llama):
    assistant = tiny.build(tiny.DENSE["llama"], seed=1)
    ids = tiny.prompt(9)
    with popmm.pruned(llama, CONFIG) as state:
        output = llama.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=assistant)
        assert output.shape == (1, 17)
        # verification passes bring several tokens, so they are read as prompt
        assert state.layers["model.layers.0.mlp"].tokens > 9


def test_assisted_generation_at_ratio_zero_equals_dense(llama):
    assistant = tiny.build(tiny.DENSE["llama"], seed=1)
    ids = tiny.prompt(9)
    dense = llama.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=assistant)
    with popmm.pruned(llama, pruning_ratio=0.0):
        assert torch.equal(llama.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=assistant), dense)


def test_several_models_keep_their_own_state(llama):
    other = tiny.build(tiny.DENSE["qwen2"], seed=1)
    first, second = tiny.prompt(9, seed=1), tiny.prompt(7, seed=2)
    with popmm.pruned(llama, CONFIG) as one, popmm.pruned(other, CONFIG) as two:
        generate(llama, first)
        generate(other, second)
        assert found(one) == expected_after_detach(llama, first)
        assert found(two) == expected_after_detach(other, second)


def expected_after_detach(model, ids):
    popmm.detach(model)
    return expected(model, ids[0])


@pytest.mark.parametrize("cache", CACHES)
def test_inputs_embeds_are_a_prompt_too(llama, cache):
    ids = tiny.prompt(9)
    embeds = llama.get_input_embeddings()(ids)
    with popmm.pruned(llama, CONFIG) as state:
        llama.generate(inputs_embeds=embeds, max_new_tokens=3, do_sample=False, cache_implementation=cache)
        assert found(state) == expected(llama, ids[0])


@torch.no_grad()
def test_without_a_cache_every_pass_is_a_prompt(llama):
    ids = tiny.prompt(9)
    dense = generate(llama, ids, use_cache=False)
    with popmm.pruned(llama, CONFIG):
        assert torch.equal(generate(llama, ids, use_cache=False), dense)


def test_reset_forgets_the_partition(llama):
    with popmm.pruned(llama, CONFIG) as state:
        generate(llama, tiny.prompt(9))
        state.reset()
        assert not state.ready and not state.layers
        generate(llama, tiny.prompt(5))
        assert state.ready


def test_inference_mode_and_no_grad_can_alternate(llama):
    ids = tiny.prompt(9)
    with popmm.pruned(llama, CONFIG):
        with torch.inference_mode():
            first = generate(llama, ids)
        second = generate(llama, ids)
        cache = llama(ids).past_key_values  # with gradients
        llama(ids[:, :3], past_key_values=cache)
        with torch.inference_mode():
            third = generate(llama, ids)
    assert torch.equal(first, second) and torch.equal(second, third)


def test_compiled_decode_takes_each_prompts_partition(llama):

    compile_config = compiled_anywhere(fullgraph=True, backend="eager")
    settings = dict(cache_implementation="static", max_length=40, do_sample=False)
    prompts = [tiny.prompt(n, seed=n) for n in (5, 9, 12)]
    with popmm.pruned(llama, CONFIG) as state:
        eager = [llama.generate(ids, **settings) for ids in prompts]
        for ids, tokens in zip(prompts, eager):
            assert torch.equal(llama.generate(ids, **settings, compile_config=compile_config), tokens)
            assert found(state) == expected_of(llama, state, ids)


def expected_of(model, state, ids):
    """The independent partition while popmm is attached: a prompt pass is dense, so hooks see dense h."""
    return independent.prompt_partitions(model, [ids[0]], BUDGET)

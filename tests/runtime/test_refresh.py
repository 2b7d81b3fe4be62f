"""``refresh_every``: a dense step now and then, whose token joins the statistics."""

import pytest
import tiny
import torch
from torch._dynamo.utils import counters

import popmm
from popmm.compat import compiled_anywhere

MODELS = {"llama": tiny.dense, "gemma3": tiny.dense, "mixtral": tiny.moe}
LAYER = "model.layers.0.mlp"


@pytest.mark.parametrize("selection", ["mask", "gate"])
@torch.no_grad()
def test_the_step_that_is_due_is_dense_and_joins_the_statistics(llama, selection):
    prompt, text = tiny.prompt(10), tiny.prompt(8, seed=1)[0]
    dense = llama(torch.cat([prompt, text[None]], 1)).logits[0, 10:]
    found = {}
    mlp = llama.model.layers[0].mlp
    with popmm.pruned(llama, ffn_ratio=0.5, selection=selection, refresh_every=3) as state:
        cache = llama(prompt).past_key_values
        squares = state.layers[LAYER].importance.double().square()
        for i, token in enumerate(text):
            handle = mlp.down_proj.register_forward_pre_hook(lambda m, args: found.update(h=args[0][0, 0]))
            with state.trace() as trace:
                logits = llama(token.view(1, 1), past_key_values=cache).logits[0, 0]
            handle.remove()
            if i % 4 == 3:  # after three pruned steps
                assert trace[LAYER].numel() == 0  # a prompt pass, which records no decode step
                score = found["h"].double().abs() * mlp.down_proj.weight.double().norm(dim=0)
                squares = squares + score.square()
                torch.testing.assert_close(state.layers[LAYER].importance.double().square(), squares, rtol=1e-4, atol=0)
                assert int(state.layers[LAYER].tokens) == 10 + (i // 4 + 1)
            else:
                assert trace[LAYER].sum() == state.layers[LAYER].budget
                assert not torch.allclose(logits, dense[i], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_never_refreshing_is_the_default(name):
    model = MODELS[name](name)
    with popmm.pruned(model, ffn_ratio=0.4) as state:
        model.generate(tiny.prompt(10), max_new_tokens=20, do_sample=False)
        first = next(iter(state.layers.values())).tokens.sum()
    with popmm.pruned(model, ffn_ratio=0.4, refresh_every=5) as state:
        model.generate(tiny.prompt(10), max_new_tokens=20, do_sample=False)
        assert next(iter(state.layers.values())).tokens.sum() > first


@pytest.mark.parametrize("name", MODELS)
def test_compiled_decode_refreshes_as_eager_decode_does(name):
    model = MODELS[name](name)
    torch._dynamo.reset()
    compile_config = compiled_anywhere(fullgraph=True, backend="eager")
    how = dict(max_new_tokens=14, do_sample=False)
    graphs = []
    with popmm.pruned(model, ffn_ratio=0.4, refresh_every=4) as state:
        for seed in range(3):
            prompt = tiny.prompt(9 + seed, seed=seed)
            eager = model.generate(prompt, **how)
            tokens = next(iter(state.layers.values())).tokens
            static = dict(cache_implementation="static", compile_config=compile_config)
            assert torch.equal(model.generate(prompt, **how, **static), eager)
            assert torch.equal(next(iter(state.layers.values())).tokens, tokens)
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 3


@torch.no_grad()
def test_a_refresh_is_dense_whatever_the_prompt_pass_is(llama):
    prompt, found = tiny.prompt(10), {}
    with popmm.pruned(llama, popmm.PopConfig.paper(ffn_ratio=0.5, refresh_every=1)):
        cache = llama(prompt).past_key_values
        llama(tiny.prompt(1, seed=1), past_key_values=cache)
        down = llama.model.layers[0].mlp.down_proj
        handle = down.register_forward_pre_hook(lambda m, args: found.update(h=args[0]))
        llama(tiny.prompt(1, seed=2), past_key_values=cache)
        handle.remove()
    assert (found["h"] != 0).all()


@torch.no_grad()
def test_cropping_after_many_refreshes_leaves_the_prompts_statistics(llama):
    with popmm.pruned(llama, ffn_ratio=0.4, refresh_every=1) as state:
        cache = llama(tiny.prompt(10)).past_key_values
        importance = state.layers[LAYER].importance
        for token in tiny.prompt(40, seed=1)[0]:
            llama(token.view(1, 1), past_key_values=cache)
        assert int(state.layers[LAYER].tokens) == 30
        cache.crop(-40)
        llama(tiny.prompt(2, seed=2), past_key_values=cache)
        assert int(state.layers[LAYER].tokens) == 12
        cache.crop(-2)
        llama(tiny.prompt(1, seed=2), past_key_values=cache)
        assert int(state.layers[LAYER].tokens) == 10
        assert torch.equal(importance, state.layers[LAYER].importance)


def test_rows_that_have_ended_do_not_count(llama):
    prompt = tiny.prompt(9).repeat(2, 1)
    prompt[1] = tiny.prompt(9, seed=5)[0]
    with popmm.pruned(llama, ffn_ratio=0.4, refresh_every=1) as state:
        texts = llama.generate(prompt, max_new_tokens=13, do_sample=False, eos_token_id=None)[:, 9:]
        assert int(state.layers[LAYER].tokens) == 18 + 2 * 6  # 12 steps, each second one a refresh
        end = int(texts[1, 0])  # ends the second row at once
        assert end not in texts[0].tolist()
        llama.generate(prompt, max_new_tokens=13, do_sample=False, eos_token_id=end, pad_token_id=0)
        assert int(state.layers[LAYER].tokens) == 18 + 6


@torch.no_grad()
def test_simulated_decode_stops_where_a_step_is_dense(llama):
    from popmm.cli.compare import decode_along

    prompt, text = tiny.prompt(10), tiny.prompt(11, seed=1)[0]
    with popmm.pruned(llama, ffn_ratio=0.4, refresh_every=3) as state:
        cache = llama(prompt).past_key_values
        with state.simulated_decode(), pytest.raises(RuntimeError, match="split it there, after 3 tokens"):
            llama(text[None], past_key_values=cache)
        cache = llama(prompt).past_key_values
        one_by_one = torch.cat([llama(t.view(1, 1), past_key_values=cache).logits[0] for t in text])
        cache = llama(prompt).past_key_values
        torch.testing.assert_close(decode_along(llama, state, text, cache), one_by_one, atol=1e-4, rtol=0)


def test_bytes_count_the_dense_steps(llama):
    with popmm.pruned(llama, ffn_ratio=0.4, selection="keep") as state:
        pruned, dense = state.bytes_per_token()
    with popmm.pruned(llama, ffn_ratio=0.4, selection="keep", refresh_every=3) as state:
        assert state.bytes_per_token() == (round((3 * pruned + dense) / 4), dense)


def test_copied_and_cropped_caches_keep_their_place(llama):
    import copy

    with torch.no_grad(), popmm.pruned(llama, ffn_ratio=0.4, refresh_every=3) as state:
        cache = llama(tiny.prompt(10)).past_key_values
        for token in tiny.prompt(2, seed=1)[0]:
            llama(token.view(1, 1), past_key_values=cache)
        twin = copy.deepcopy(cache)
        for own in (cache, twin):
            for token in tiny.prompt(2, seed=2)[0]:  # the second is due
                llama(token.view(1, 1), past_key_values=own)
            assert int(state.layers[LAYER].tokens) == 11

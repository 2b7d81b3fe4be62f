"""Experts outside transformers' experts interface, norms after experts: against loops that know each family by name."""

import pytest
import small_families
import tiny
import torch
from independent_own import PLAIN, by_loops, called, dense_output, h_of, modules_of
from matrix import CHUNKS_IN_STATIC_CACHES, OWN_EXPERTS

import popmm
from popmm.compat import compiled_anywhere
from popmm.method import reference

RATIO = 0.4
CONFIG = popmm.PopConfig(ffn_ratio=RATIO, candidate_fraction=0.2, prior_tokens=0, shared_experts="prune")
PARTS = ("retained", "candidate", "pruned")
SELECTIONS = {
    "mask": CONFIG.replace(selection="mask"),
    "keep": CONFIG.replace(selection="keep"),
    "gate": CONFIG.replace(selection="gate", gate_bits=16, candidate_fraction=0.8),
    "gate, in place": CONFIG.replace(selection="gate", gate_bits=16, candidate_fraction=0.8, layout="permute"),
}


@pytest.fixture(params=[name for name in PLAIN if small_families.has(name)])
def name(request):
    return request.param


def built(name):
    return small_families.small_model(name)


@torch.no_grad()
def prompt_and_steps(model, ids, continuation):
    """Logits of each step."""
    cache = model(input_ids=ids, use_cache=True).past_key_values
    return [model(input_ids=t.view(1, 1), past_key_values=cache).logits for t in continuation]


@torch.no_grad()
def test_the_loops_are_the_modules(name):
    model, plain = built(name), PLAIN[name]
    with called(model, plain) as seen:
        model(input_ids=tiny.prompt(9))
    for layer, m in modules_of(model, plain).items():
        ((args, found),) = seen[layer]
        expected = by_loops(plain, m, args, dense_output(plain, m))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_each_expert_has_the_partition_of_the_tokens_routed_to_it(name):
    model, plain = built(name), PLAIN[name]
    compared = 0
    with popmm.pruned(model, SELECTIONS["mask"]) as state, called(model, plain) as seen:
        model(input_ids=tiny.prompt(20), use_cache=True)
    for layer, m in modules_of(model, plain).items():
        ((args, _),) = seen[layer]
        flat, found, rows = args[0].flatten(0, -2), state.layers[layer], plain.routes(m, *args)
        budget = round((1 - RATIO) * found.importance.shape[-1])
        for e in range(len(found.tokens)):
            own = [row for row, expert, _ in rows if expert == e]
            assert found.tokens[e] == len(own)
            if own:
                h, down = h_of(plain, m, e, flat[own]), plain.weights(m, e)[2]
                expected = reference.partition(reference.prompt_importance("wanda", h, down), budget, 0.2)
                assert tuple(getattr(found, part)[e].tolist() for part in PARTS) == expected
                compared += 1
    assert compared > 1


@pytest.mark.parametrize("selection", SELECTIONS)
@torch.no_grad()
def test_decode_equals_a_loop_over_pairs(name, selection):
    model, plain = built(name), PLAIN[name]
    ids, continuation, differs = tiny.prompt(20), tiny.prompt(6, seed=1)[0], False
    with popmm.pruned(model, SELECTIONS[selection]) as state, called(model, plain) as seen, state.trace() as trace:
        prompt_and_steps(model, ids, continuation)
        layers = dict(state.layers)
    for layer, m in modules_of(model, plain).items():
        p, ((prompt, _), *calls) = layers[layer], seen[layer]
        routes, flat = plain.routes(m, *prompt), prompt[0].flatten(0, -2)
        assert len(calls) == len(continuation)
        for passing, (args, found) in zip(trace[layer][:, 0], calls):

            def output(e, x, passing=passing, p=p, m=m, routes=routes, flat=flat):
                h, (gate, up, down), mask = h_of(plain, m, e, x)[0], plain.weights(m, e), passing[e]
                read = [*p.retained[e].tolist(), *p.candidate[e].tolist()]
                if selection == "mask":
                    regions = p.retained[e].tolist(), p.candidate[e].tolist()
                    assert torch.equal(mask, reference.decode_mask(h, down, *regions, p.budget))
                elif selection == "keep":
                    assert mask.nonzero().flatten().tolist() == sorted(read)
                else:
                    assert mask.sum() == p.budget < len(read)
                    seen_rows = [row for row, expert, _ in routes if expert == e]
                    if seen_rows:
                        rms = (flat[seen_rows] @ up.T).square().mean(0).sqrt()
                        weight = plain.combine(m, x[0] @ gate.T, rms).abs() * down.norm(dim=0)
                        best = sorted(read, key=lambda i: -weight[i])[: p.budget]
                        assert sorted(best) == mask.nonzero().flatten().tolist()
                return down @ (h * mask)

            expected = by_loops(plain, m, args, output)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            dense = by_loops(plain, m, args, dense_output(plain, m))
            differs |= bool((dense - expected).abs().max() > 1e-3)
    assert differs


@torch.no_grad()
def test_tiers_give_each_pair_what_its_experts_planes_do(name):
    model, plain = built(name), PLAIN[name]
    with popmm.pruned(model, bytes=0.28, shared_experts="prune") as state, called(model, plain) as seen:
        prompt_and_steps(model, tiny.prompt(20), tiny.prompt(6, seed=1)[0])
        assert state.config.selection == "tiers"
        ffns = {ffn.name: ffn for ffn in state._ffns}
        for layer, m in modules_of(model, plain).items():
            for args, found in seen[layer][1:]:

                def output(e, x, layout=ffns[layer].layout, m=m):
                    expert = torch.tensor([e])
                    return layout.decode(x, lambda g, u: plain.combine(m, g, u), expert)[0][0]

                expected = by_loops(plain, m, args, output)
                assert (found - expected).norm() <= 1e-3 * expected.norm()
                dense = by_loops(plain, m, args, dense_output(plain, m))
                assert (found - dense).norm() <= 0.5 * dense.norm()


EXACT = {
    "mask": dict(selection="mask", ffn_ratio=0.0),
    "gate": dict(selection="gate", gate_bits=16, ffn_ratio=0.0),
    "tiers": dict(bytes=1.0),
    "pruned prefill": dict(selection="mask", ffn_ratio=0.0, prefill="pruned"),
}


@pytest.mark.parametrize("settings", EXACT)
def test_with_nothing_pruned_the_logits_are_the_dense_models(name, settings):
    model, ids, continuation = built(name), tiny.prompt(9), tiny.prompt(4, seed=1)[0]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dense = prompt_and_steps(model, ids, continuation)
    with popmm.pruned(model, shared_experts="prune", **EXACT[settings]) as state:
        found = prompt_and_steps(model, ids, continuation)
        assert state.ready and state.passes["dense"] == 0 and set(modules_of(model, PLAIN[name])) <= set(state.layers)
    assert all(torch.equal(a, b) for a, b in zip(found, dense))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("layout", ["copy", "permute"])
def test_a_dense_prompt_is_untouched_and_detach_gives_back_every_byte(name, layout):
    model, ids = built(name), tiny.prompt(9)
    before = {key: (value.clone(), value.data_ptr(), value.stride()) for key, value in model.state_dict().items()}
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=True).logits
        with popmm.pruned(model, SELECTIONS["mask"].replace(layout=layout)):
            assert torch.equal(model(input_ids=ids, use_cache=True).logits, dense)
            prompt_and_steps(model, tiny.prompt(12, seed=3), tiny.prompt(3, seed=1)[0])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key][0]) and (value.data_ptr(), value.stride()) == before[key][1:]
    assert not [n for n, m in model.named_modules() if "forward" in m.__dict__]


@torch.no_grad()
def test_a_pruned_prompt_turns_each_experts_pruned_channels_off(name):
    model, plain = built(name), PLAIN[name]
    config = SELECTIONS["keep"].replace(prefill="pruned")
    with popmm.pruned(model, config) as state, called(model, plain) as seen:
        model(input_ids=tiny.prompt(12), use_cache=True)
    for layer, m in modules_of(model, plain).items():
        ((args, found),), pruned = seen[layer], state.layers[layer].pruned

        def output(e, x, m=m, pruned=pruned):
            h = h_of(plain, m, e, x)[0]
            h[pruned[e]] = 0
            return plain.weights(m, e)[2] @ h

        torch.testing.assert_close(found, by_loops(plain, m, args, output), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("selection", ["mask", "tiers"])
def test_compiled_steps_give_the_eager_tokens(name, selection):
    model, ids = built(name), tiny.prompt(9, batch=2)
    if not model._can_compile_fullgraph:
        pytest.skip("the dense model's steps do not compile in one graph")
    if name == "llama4_text" and not CHUNKS_IN_STATIC_CACHES:
        pytest.skip("the dense model does not generate over static caches in transformers 5.17")
    torch._dynamo.reset()
    compiling = compiled_anywhere(fullgraph=True, backend="eager")
    how = dict(input_ids=ids, cache_implementation="static", max_length=20, do_sample=False)
    settings = CONFIG.replace(selection=selection) if selection == "mask" else popmm.PopConfig(bytes=0.3)
    with popmm.pruned(model, settings):
        eager = model.generate(**how)
        assert torch.equal(model.generate(**how, compile_config=compiling), eager)


@pytest.mark.parametrize("name", OWN_EXPERTS)
def test_tokens_in_one_pass_are_pruned_each_as_it_is(name):
    """``generate_batch``: prompts are dense, decode tokens pruned, in one pass."""
    model, plain = built(name), PLAIN[name]
    with popmm.pruned(model, statistics="weights", bytes=0.3, shared_experts="prune") as state:
        ffn = next(f for f in state._ffns if f.site.routing is not None)
        alone = torch.tensor([True, False, False, True, False])
        with called(model, plain) as seen, torch.no_grad():
            model(input_ids=tiny.prompt(5), use_cache=True)
        args = seen[ffn.name][0][0]
        x, index, weight = ffn.site.routing.read(*args)
        phase, phase.alone = ffn.phase, alone
        found = ffn.mixed(x, index, weight)
        phase.alone = None
        steps = ffn.decode(x[alone], index[alone], weight[alone])[0]
    dense = ffn.site.routing.give(found, *args)
    with torch.no_grad():
        expected = ffn.site.module(*args)
    torch.testing.assert_close(found[alone], steps)
    if name != "llama4_text":
        torch.testing.assert_close(dense.view_as(x)[~alone], expected.view_as(x)[~alone], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OWN_EXPERTS)
def test_weights_can_be_freed(name, tmp_path):
    built(name).save_pretrained(tmp_path)
    model = type(built(name)).from_pretrained(tmp_path).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids, continuation = tiny.prompt(9), tiny.prompt(3, seed=1)[0]
    with popmm.pruned(model, bytes=0.3):
        kept = prompt_and_steps(model, ids, continuation)
    with popmm.pruned(model, bytes=0.3, weights="replace") as state:
        found = prompt_and_steps(model, ids, continuation)
        assert state.freed_bytes() > 0
    assert (found[0] - kept[0]).norm() < 0.1 * kept[0].norm()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_lossless_decoding_gives_the_dense_models_tokens(name):
    model, ids = built(name), tiny.prompt(9)
    how = dict(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, min_new_tokens=8)
    dense = model.generate(**how)
    with popmm.pruned(model, lossless=True) as state:
        assert torch.equal(model.generate(**how), dense)
        assert state.passes["decode"] > 0 and state.passes["dense"] == 0

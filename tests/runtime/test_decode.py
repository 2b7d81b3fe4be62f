"""Compiled decode over static caches: one compilation and one set of addresses for all prompts of a bucket."""

import itertools

import pytest
import tiny
import tiny_vlm
import torch
from torch._dynamo.utils import counters

import popmm
from popmm.compat import compiled_anywhere
from popmm.runtime.caches import BUCKET

STATIC = dict(cache_implementation="static", do_sample=False, max_new_tokens=5)
CONFIG = popmm.PopConfig(ffn_ratio=0.4)


def compiled(fullgraph=True, backend="eager"):
    return compiled_anywhere(fullgraph=fullgraph, backend=backend)


def cache_of(model, ids, **how):
    return model.generate(ids, **STATIC, return_dict_in_generate=True, **how).past_key_values


def addresses(cache):
    return [layer.keys.data_ptr() for layer in cache.layers]


def inputs_of(name, n, seed):
    if name in tiny_vlm.VLMS:
        model_inputs = tiny_vlm.inputs(MODELS[name], name, [seed], n_text=n)
        return model_inputs
    return {"input_ids": tiny.prompt(n, seed=seed)}


MODELS = {}


COMPILED = ["llama", "gpt2", "opt", "mixtral", "qwen2-moe", "llava", "qwen2-vl", "qwen3-vl-moe", "gemma3"]


@pytest.mark.parametrize("name, selection", [*itertools.product(COMPILED, ["mask", "gate"]), ("llama", "keep")])
def test_ten_prompts_of_ten_lengths_compile_once(name, selection):
    build = tiny_vlm.build if name in tiny_vlm.VLMS else tiny.moe if name in tiny.MOE else tiny.dense
    model = build(name)
    MODELS[name] = model
    torch._dynamo.reset()
    graphs = []
    with popmm.pruned(model, CONFIG.replace(selection=selection)):
        for n in range(5, 15):
            inputs = inputs_of(name, n, n)
            eager = model.generate(**inputs, **STATIC)
            assert torch.equal(model.generate(**inputs, **STATIC, compile_config=compiled()), eager)
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 10 and graphs[0] > 0


def test_static_caches_keep_their_addresses_from_prompt_to_prompt(llama):
    with popmm.pruned(llama, CONFIG):
        first = addresses(cache_of(llama, tiny.prompt(9)))
        assert addresses(cache_of(llama, tiny.prompt(14, seed=2))) == first
        assert cache_of(llama, tiny.prompt(9)).layers[0].keys.shape[2] == BUCKET


def test_a_cache_that_somebody_holds_is_not_used_again(llama):
    with popmm.pruned(llama, CONFIG):
        held = cache_of(llama, tiny.prompt(9))
        keys = held.layers[0].keys.clone()
        other = cache_of(llama, tiny.prompt(9, seed=5))
        assert not set(addresses(held)) & set(addresses(other))
        assert torch.equal(held.layers[0].keys, keys)


@pytest.mark.parametrize("part", [lambda c: c.layers, lambda c: c.layers[1], lambda c: c.layers[0].values], ids="abc")
def test_a_cache_whose_parts_are_held_is_not_used_again(llama, part):
    with popmm.pruned(llama, CONFIG):
        held = part(cache_of(llama, tiny.prompt(9)))
        first = held if isinstance(held, torch.Tensor) else (held[0] if isinstance(held, list) else held).keys
        before = first.clone()
        cache_of(llama, tiny.prompt(9, seed=5))
        assert torch.equal(first, before)


def test_compiled_calls_use_their_cache_again(llama):
    torch._dynamo.reset()
    with popmm.pruned(llama, CONFIG):
        found = {tuple(addresses(cache_of(llama, tiny.prompt(n), compile_config=compiled()))) for n in (5, 9, 12)}
    assert len(found) == 1


def test_a_model_moved_to_another_dtype_gets_another_cache(llama):
    with popmm.pruned(llama, CONFIG):
        llama.generate(tiny.prompt(9), **STATIC)
        llama.to(torch.bfloat16)
        llama.generate(tiny.prompt(9), **STATIC)


def test_tokens_are_those_of_fresh_caches(llama):
    prompts = [tiny.prompt(n, batch=b, seed=n) for n, b in ((5, 1), (9, 2), (4, 1), (11, 2), (5, 1))]
    with popmm.pruned(llama, CONFIG):
        found = [llama.generate(ids, **STATIC) for ids in prompts]
    for ids, tokens in zip(prompts, found):
        with popmm.pruned(llama, CONFIG):
            assert torch.equal(llama.generate(ids, **STATIC), tokens)


@torch.inference_mode()
def test_caches_of_inference_mode_stay_there(llama):
    with popmm.pruned(llama, CONFIG):
        inside = llama.generate(tiny.prompt(9), **STATIC)
        with torch.inference_mode(False):
            assert torch.equal(llama.generate(tiny.prompt(9).clone(), **STATIC), inside)


def test_beams_and_detach(llama):
    plain = llama._prepare_static_cache
    with popmm.pruned(llama, CONFIG):
        assert llama._prepare_static_cache != plain
        llama.generate(tiny.prompt(9), **STATIC, num_beams=3)
    assert llama._prepare_static_cache == plain


@pytest.mark.parametrize("selection", ["mask", "keep", "gate"])
@pytest.mark.parametrize("layout", ["copy", "permute"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_no_weights_are_copied_into_a_graph(name, layout, selection):
    """Inputs of a graph that are not known to stay where they are would be copied by CUDA graphs at each step."""
    moving = []

    def backend(graph, example_inputs, **options):
        for node, value in zip((n for n in graph.graph.nodes if n.op == "placeholder"), example_inputs):
            fixed = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
            if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter) and not fixed:
                moving.append((node.name, tuple(value.shape)))
        return graph.forward

    model = tiny.dense(name) if name in tiny.DENSE else tiny.moe(name)
    torch._dynamo.reset()
    config = CONFIG.replace(selection=selection, layout=layout, fill="mean")
    with popmm.pruned(model, config):
        model.generate(tiny.prompt(9), **STATIC, compile_config=compiled(backend=backend))
    assert moving and all("layout" not in name for name, _ in moving), moving
    assert sum(torch.Size(shape).numel() for _, shape in moving) < 2000

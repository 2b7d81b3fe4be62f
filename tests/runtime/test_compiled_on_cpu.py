"""Decode steps over a static cache are compiled on the CPU too, where an FFN is one operator."""

import pytest
import tiny
import torch
import torch._dynamo.utils
from matrix import MODELS, generate

import popmm
from popmm.compat import stays_compiled
from popmm.kernels import operators
from popmm.runtime import wrappers

pytestmark = pytest.mark.skipif(not operators.available(), reason="no C++ compiler")
SETTINGS = dict(bytes=0.3, rest_bits=8)


@pytest.fixture
def any_size(monkeypatch):
    monkeypatch.setattr(wrappers, "LARGE", 0)
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_one_graph_serves_prompt_after_prompt(any_size):
    model = MODELS["llama"].build()
    with popmm.pruned(model, **SETTINGS) as state:
        eager = [generate(model, {"input_ids": tiny.prompt(n, seed=n)}, new=8)[0] for n in (9, 14, 21)]
        before = graphs()
        for n, expected in zip((9, 14, 21), eager):
            found, _ = generate(model, {"input_ids": tiny.prompt(n, seed=n)}, new=8, cache_implementation="static")
            assert torch.equal(found, expected)
            assert graphs() == before + 1
        assert dict(state.passes) == {"prompt": 6, "decode": 42, "dense": 0}
    before = graphs()
    generate(model, {"input_ids": tiny.prompt(9)}, new=4, cache_implementation="static")
    assert graphs() == before  # detached: as transformers has it


@pytest.mark.parametrize("settings", [dict(ffn_ratio=0.4, selection="gate"), dict(ffn_ratio=0.4, selection="mask")])
def test_other_selections_are_compiled_when_asked(settings, any_size):
    model = MODELS["llama"].build()
    with popmm.pruned(model, **settings):
        before = graphs()
        generate(model, {"input_ids": tiny.prompt(9)}, cache_implementation="static")
        assert graphs() == before


def test_small_models_and_those_that_refuse_are_not_compiled(any_size, monkeypatch):
    model = MODELS["llama"].build()
    with popmm.pruned(model, **SETTINGS):
        before = graphs()
        generate(model, {"input_ids": tiny.prompt(9)}, cache_implementation="static", disable_compile=True)
        monkeypatch.setattr(wrappers, "LARGE", 64 << 20)
        generate(model, {"input_ids": tiny.prompt(9)}, cache_implementation="static")
        assert graphs() == before


def test_sliding_windows_keep_their_guards():
    from transformers import StaticCache

    model = MODELS["gpt-oss"].build()
    assert not stays_compiled(StaticCache(config=model.config, max_cache_len=64))
    assert stays_compiled(StaticCache(config=MODELS["llama"].build().config, max_cache_len=64))

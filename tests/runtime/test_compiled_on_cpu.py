"""Decode steps over a static cache are compiled on the CPU too, where an FFN is one operator."""

import threading

import pytest
import tiny
import torch
import torch._dynamo.utils
from matrix import MODELS, generate

import popmm
from popmm.compat import stays_compiled
from popmm.kernels import operators
from popmm.runtime import guards, wrappers

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
def test_other_selections_are_not_compiled_by_themselves(settings, any_size):
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


def test_guards_are_held_by_one_and_by_nobody_else():
    torch.compile(lambda x: (x + 1).sin())(torch.ones(3))  # whose workers are nobody else
    stance = lambda: torch._dynamo.eval_frame._stance  # noqa: E731
    before = stance()
    with guards.held_after(guards.WARM):
        assert stance().skip_guard_eval_unsafe
        with guards.held_after(guards.WARM):
            assert stance().skip_guard_eval_unsafe
    assert stance() == before
    with guards.held_after(guards.WARM - 1):
        assert stance() == before
    with torch.compiler.set_stance("force_eager"), guards.held_after(guards.WARM):
        assert stance().stance == "force_eager" and not stance().skip_guard_eval_unsafe
    done, other = threading.Event(), threading.Thread(target=lambda: done.wait(10))
    other.start()
    try:
        with guards.held_after(guards.WARM):
            assert stance() == before
    finally:
        done.set()
        other.join()


@torch._dynamo.config.patch(recompile_limit=1)
def test_steps_that_ran_eagerly_hold_no_guards(any_size):
    """Past the compiler's limit of compilations a step runs eagerly, and the next is compared again."""
    for seed in (1, 2):
        model = MODELS["llama"].build()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.05)
        inputs = {"input_ids": tiny.prompt(9)}
        with popmm.pruned(model, **SETTINGS):
            expected = generate(model, inputs, new=8)[1]
            found = generate(model, inputs, new=8, cache_implementation="static")[1]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_choice_without_a_prompt_is_compiled_too(any_size):
    model = MODELS["llama"].build()
    with popmm.pruned(model, statistics="weights", **SETTINGS):
        eager = generate(model, {"input_ids": tiny.prompt(9)}, new=6)[0]
        before = graphs()
        found = generate(model, {"input_ids": tiny.prompt(9)}, new=6, cache_implementation="static")[0]
        assert torch.equal(found, eager) and graphs() == before + 1
    assert "_compiled_call" not in model.__dict__

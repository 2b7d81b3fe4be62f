"""Passes that are neither a plain prompt nor a plain decode step, and threads that meet."""

from __future__ import annotations

import io
import threading
import warnings

import pytest
import tiny
import torch
from transformers import DynamicCache, GenerationConfig

import popmm
from popmm import compat
from popmm.compat import compiled_anywhere
from popmm.runtime.attachment import MARKER
from popmm.runtime.passes import NotPrunedWarning

CONFIG = popmm.PopConfig(ffn_ratio=0.5, candidate_fraction=0.2, selection="mask")
NAME = "model.layers.0.mlp"


def run(model, ids, cache=None):
    with torch.no_grad():
        out = model(ids, **compat.cache_argument(model, cache))
    return out.logits, compat.cache_of(out)


def step(model, cache, seed=4):
    return run(model, tiny.prompt(1, seed=seed), cache)[0]


def rebuilt(cache, config):
    """A cache made of another's tensors."""
    new = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        new.update(layer.keys.clone(), layer.values.clone(), i)
    return new


# One token on a cache that popmm has not read


def test_a_step_on_a_cache_filled_before_attach_is_dense_and_warns_once(llama):
    _, cache = run(llama, tiny.prompt(9))
    _, twin = run(llama, tiny.prompt(9))
    expected = [step(llama, twin, seed) for seed in (1, 2)]
    with popmm.pruned(llama, CONFIG) as state:
        with pytest.warns(NotPrunedWarning, match="has not read the prompt in this cache") as caught:
            found = [step(llama, cache, seed) for seed in (1, 2)]
        assert len(caught) == 1
        assert all(map(torch.equal, found, expected))
        assert dict(state.passes) == {"prompt": 0, "decode": 0, "dense": 2} and not state.ready
        assert "has not read the prompt in this cache" in state.summary()
        run(llama, tiny.prompt(3, seed=5), cache)  # several tokens are a prompt
        step(llama, cache)
        assert dict(state.passes) == {"prompt": 1, "decode": 1, "dense": 2}


def test_a_step_after_reset_is_dense(llama):
    _, twin = run(llama, tiny.prompt(9))
    expected = step(llama, twin)
    with popmm.pruned(llama, CONFIG) as state:
        _, cache = run(llama, tiny.prompt(9))
        state.reset()
        with pytest.warns(NotPrunedWarning):
            assert torch.equal(step(llama, cache), expected)
        assert not state.ready


def test_an_unknown_cache_does_not_borrow_another_prompts_partition(llama):
    _, twin = run(llama, tiny.prompt(9))
    expected = step(llama, twin)
    with popmm.pruned(llama, CONFIG) as state:
        _, cache = run(llama, tiny.prompt(9))
        run(llama, tiny.prompt(7, seed=2))
        with pytest.warns(NotPrunedWarning):
            assert torch.equal(step(llama, rebuilt(cache, llama.config)), expected)
        assert state.layers[NAME].tokens == 7


def test_attaching_in_the_middle_of_a_generate_runs_it_dense_to_its_end(llama):
    dense = llama.generate(tiny.prompt(9), max_new_tokens=8, do_sample=False)

    def attach_late(ids, scores, **kwargs):
        if ids.shape[1] == 12 and MARKER not in llama.model.__dict__:
            popmm.attach(llama, CONFIG)
        return torch.zeros(len(ids), dtype=torch.bool)

    with pytest.warns(NotPrunedWarning):
        out = llama.generate(tiny.prompt(9), max_new_tokens=8, do_sample=False, stopping_criteria=[attach_late])
    popmm.detach(llama)
    assert torch.equal(out, dense)


def test_a_generate_on_an_unknown_cache_with_one_new_token_warns_once(llama):
    _, cache = run(llama, tiny.prompt(9))
    ids = torch.cat([tiny.prompt(9), tiny.prompt(1, seed=1)], 1)
    dense = llama.generate(ids, max_new_tokens=4, do_sample=False)
    with popmm.pruned(llama, CONFIG):
        with pytest.warns(NotPrunedWarning) as caught:
            out = llama.generate(ids, max_new_tokens=4, do_sample=False, **compat.cache_argument(llama, cache))
        assert len(caught) == 1
    assert torch.equal(out, dense)


def test_a_saved_and_loaded_cache_brings_its_statistics(llama):
    with popmm.pruned(llama, CONFIG):
        _, cache = run(llama, tiny.prompt(9))
        _, twin = run(llama, tiny.prompt(9))
        expected = step(llama, twin)
        file = io.BytesIO()
        torch.save(cache, file)
    file.seek(0)
    with popmm.pruned(llama, CONFIG) as state, warnings.catch_warnings():
        warnings.simplefilter("error", NotPrunedWarning)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(step(llama, loaded), expected)
        assert state.layers[NAME].tokens == 9


def test_statistics_can_be_given_to_a_rebuilt_cache(llama):
    with popmm.pruned(llama, CONFIG) as state:
        _, cache = run(llama, tiny.prompt(9))
        _, twin = run(llama, tiny.prompt(9))
        saved = state.save_statistics(cache)
        expected, new = step(llama, twin), rebuilt(cache, llama.config)
        run(llama, tiny.prompt(7, seed=2))
        state.load_statistics(new, saved)
        assert torch.equal(step(llama, new), expected)
        with pytest.raises(ValueError, match="has read no prompt into this DynamicCache"):
            state.save_statistics(DynamicCache())
        with pytest.raises(TypeError, match="save_statistics"):
            state.load_statistics(new, {})


def test_statistics_of_another_model_are_refused(llama):
    other = tiny.build(tiny.DENSE["llama"], seed=1)
    with popmm.pruned(other, CONFIG) as theirs:
        _, cache = run(other, tiny.prompt(9))
        saved = theirs.save_statistics(cache)
        file = io.BytesIO()
        torch.save(cache, file)
    file.seek(0)
    with popmm.pruned(llama, CONFIG) as state:
        with pytest.raises(ValueError, match="of another model"):
            state.load_statistics(DynamicCache(), saved)
        with pytest.warns(NotPrunedWarning):
            step(llama, torch.load(file, weights_only=False))


# The first pass of a generate


def test_the_first_pass_of_a_generate_is_a_prompt_however_short(llama):
    with popmm.pruned(llama, CONFIG) as state:
        _, cache = run(llama, tiny.prompt(9))
        ids = torch.cat([tiny.prompt(9), tiny.prompt(1, seed=1)], 1)
        llama.generate(ids, max_new_tokens=4, do_sample=False, **compat.cache_argument(llama, cache))
        assert dict(state.passes) == {"prompt": 2, "decode": 3, "dense": 0}
        assert state.layers[NAME].tokens == 10


@pytest.mark.parametrize("how", ["positional", "keyword", "own"])
def test_beams_count_a_prompt_once_wherever_their_number_stands(llama, how):
    ids = tiny.prompt(9)
    config = GenerationConfig(num_beams=3, max_new_tokens=4, do_sample=False)
    with popmm.pruned(llama, CONFIG) as state:
        if how == "positional":
            llama.generate(ids, config)
        elif how == "keyword":
            llama.generate(ids, generation_config=config)
        else:
            llama.generation_config.num_beams = 3
            llama.generate(ids, max_new_tokens=4, do_sample=False)
        assert state.layers[NAME].tokens == 9


# Calls that are refused


@pytest.mark.parametrize("call", ["generate_batch", "init_continuous_batching", "paged"])
def test_continuous_batching_is_refused(llama, call):
    with popmm.pruned(llama, CONFIG), pytest.raises(RuntimeError, match="continuous batching .* popmm.detach"):
        if call == "paged":
            llama.generate(tiny.prompt(9), cache_implementation="paged", max_new_tokens=2)
        else:
            getattr(llama, call)(inputs=[[5, 6, 7]])


def test_a_forward_inside_a_forward_is_refused(llama):
    with popmm.pruned(llama, CONFIG) as state:
        handle = llama.model.layers[1].register_forward_pre_hook(lambda *args: run(llama, tiny.prompt(5)) and None)
        with pytest.raises(RuntimeError, match="from inside its own forward"):
            run(llama, tiny.prompt(9))
        handle.remove()
        _, cache = run(llama, tiny.prompt(9))
        step(llama, cache)
        assert dict(state.passes) == {"prompt": 1, "decode": 1, "dense": 0}


@pytest.mark.parametrize("strict", [True, False])
def test_export_is_refused(llama, strict):
    with popmm.pruned(llama, CONFIG):
        with pytest.raises(Exception, match="popmm.detach"):
            torch.export.export(llama, (tiny.prompt(9),), kwargs={"use_cache": False}, strict=strict)
    with pytest.raises(RuntimeError, match="popmm.detach"), popmm.pruned(llama, CONFIG):
        torch.jit.trace(lambda ids: llama(ids, use_cache=False).logits, tiny.prompt(9))


def test_gradients_under_permute_are_refused_in_one_sentence(llama):
    with popmm.pruned(llama, CONFIG.replace(layout="permute")):
        logits = llama(tiny.prompt(9)).logits
        with pytest.raises(
            RuntimeError, match="gradients through an attached model with layout='permute'.*layout='copy'"
        ):
            logits.sum().backward()
        hidden = llama(tiny.prompt(9), output_hidden_states=True).hidden_states
        with pytest.raises(RuntimeError, match="gradients through an attached model"):
            hidden[-1].sum().backward()
    with popmm.pruned(llama, CONFIG.replace(layout="copy")):
        llama(tiny.prompt(9)).logits.sum().backward()
    assert llama.model.layers[0].mlp.up_proj.weight.grad is not None


def test_an_ffn_called_by_itself_is_dense(llama):
    x = torch.randn(1, 1, 32)
    expected = llama.model.layers[0].mlp(x)
    with popmm.pruned(llama, CONFIG):
        llama.generate(tiny.prompt(9), max_new_tokens=3, do_sample=False)
        assert torch.equal(llama.model.layers[0].mlp(x), expected)


@pytest.mark.parametrize("act", ["detach", "reset", "load_statistics", "repartition"])
@pytest.mark.parametrize("layout", ["copy", "permute"])
def test_acts_inside_a_forward_are_refused(llama, layout, act):
    with popmm.pruned(llama, CONFIG.replace(layout=layout)) as state:
        _, cache = run(llama, tiny.prompt(9))
        calls = {
            "detach": lambda: popmm.detach(llama),
            "reset": state.reset,
            "load_statistics": lambda: state.load_statistics(cache, state.save_statistics(cache)),
            "repartition": state.repartition,
        }
        handle = llama.model.layers[1].register_forward_pre_hook(lambda *args: calls[act]() and None)
        with pytest.raises(RuntimeError, match=f"{act} was called from inside the model's own forward"):
            step(llama, cache)
        handle.remove()
        step(llama, cache)


def test_gradients_of_a_pass_under_turned_weights_are_refused_after_detach():
    model, _ = popmm.zoo.load("stories")
    ids = torch.arange(5, 25)[None]
    early = model(ids, labels=ids).loss  # before attach
    with popmm.pruned(model, selection="gate", layout="permute"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            early.backward()
        loss = model(ids, labels=ids).loss
        model(ids, labels=ids).loss.backward()  # both while attached: right
    found = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    with pytest.raises(RuntimeError, match="gradients through an attached model"):
        loss.backward()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(found, model.model.layers[0].mlp.up_proj.weight.grad)


# Several caches, models and threads


def test_a_reset_in_the_middle_of_a_generate_warns_once(llama):
    def reset(ids, scores, **kwargs):
        if ids.shape[1] == 12:
            state.reset()
        return torch.zeros(len(ids), dtype=torch.bool)

    with popmm.pruned(llama, CONFIG) as state:
        with pytest.warns(NotPrunedWarning) as caught:
            llama.generate(tiny.prompt(9), max_new_tokens=9, do_sample=False, stopping_criteria=[reset])
        assert len(caught) == 1
        assert dict(state.passes) == {"prompt": 1, "decode": 2, "dense": 6}


@pytest.mark.parametrize("negative", [True, False])
def test_guidance_decodes_pruned_and_does_not_warn(llama, negative):
    how = dict(negative_prompt_ids=tiny.prompt(4, seed=3)) if negative else {}
    with popmm.pruned(llama, CONFIG) as state, warnings.catch_warnings():
        warnings.simplefilter("error", NotPrunedWarning)
        llama.generate(tiny.prompt(9), max_new_tokens=5, do_sample=False, guidance_scale=1.5, **how)
        assert state.passes["decode"] == 8 and state.passes["dense"] == 0


def test_a_pruned_assistant_does_not_warn(llama):
    target = tiny.build(tiny.DENSE["llama"], seed=1)
    with popmm.pruned(llama, CONFIG), warnings.catch_warnings():
        warnings.simplefilter("error", NotPrunedWarning)
        target.generate(tiny.prompt(9), max_new_tokens=8, do_sample=False, assistant_model=llama)


def test_a_cropped_turn_is_forgotten_by_the_next_step(llama):
    with popmm.pruned(llama, CONFIG) as state:
        _, twin = run(llama, tiny.prompt(9))
        expected = step(llama, twin)
        _, cache = run(llama, tiny.prompt(9))
        run(llama, tiny.prompt(14, seed=2), cache)
        cache.crop(-14)
        assert torch.equal(step(llama, cache), expected)
        assert state.layers[NAME].tokens == 9


def test_a_compiled_step_on_an_unknown_cache_is_dense(llama):
    from transformers import StaticCache

    compile_config = compiled_anywhere(fullgraph=True, backend="eager")
    ids, how = tiny.prompt(9), dict(do_sample=False, max_new_tokens=6, compile_config=compile_config)
    longer = torch.cat([ids, tiny.prompt(1, seed=1)], 1)

    def filled():
        cache = StaticCache(config=llama.config, max_cache_len=32)
        run(llama, ids, cache)
        return compat.cache_argument(llama, cache)

    dense, known = llama.generate(longer, **how, **filled()), filled()
    with popmm.pruned(llama, CONFIG) as state:
        llama.generate(tiny.prompt(7, seed=2), do_sample=False, max_new_tokens=3)
        with pytest.warns(NotPrunedWarning) as caught:
            out = llama.generate(longer, **how, **known)
        assert len(caught) == 1 and torch.equal(out, dense)
        assert dict(state.passes) == {"prompt": 1, "decode": 2, "dense": 6}


def test_a_forward_that_leads_past_the_phase_warns(llama):
    with popmm.pruned(llama, CONFIG) as state:
        llama.generate(tiny.prompt(9), max_new_tokens=3, do_sample=False)
        ours = llama.model.__dict__.pop("forward")
        with pytest.warns(NotPrunedWarning, match="forward was replaced while attached") as caught:
            run(llama, tiny.prompt(9))
            run(llama, tiny.prompt(9))
        assert len(caught) == 1 and state.passes["prompt"] == 1
        llama.model.__dict__["forward"] = ours


@pytest.mark.parametrize("layout", ["copy", "permute"])
def test_models_that_share_layers_cannot_both_be_attached(llama, layout):
    other = tiny.build(tiny.DENSE["llama"], seed=1)
    other.model.layers = llama.model.layers
    before = {name: p.clone() for name, p in llama.named_parameters()}
    with popmm.pruned(llama, CONFIG.replace(layout=layout)):
        with pytest.raises(RuntimeError, match="model.layers.0.mlp belongs to another attached model too"):
            popmm.attach(other, CONFIG.replace(layout=layout))
        llama.generate(tiny.prompt(9), max_new_tokens=3, do_sample=False)
    with popmm.pruned(other, CONFIG):
        other.generate(tiny.prompt(9), max_new_tokens=3, do_sample=False)
    assert not any("forward" in vars(module) for module in other.modules())
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())


def test_pruned_waits_for_a_thread_that_still_generates(llama):
    begun, go_on = threading.Event(), threading.Event()

    def hold(ids, scores, **kwargs):
        begun.set()
        go_on.wait(10)
        return torch.zeros(len(ids), dtype=torch.bool)

    def generate():
        llama.generate(tiny.prompt(9), max_new_tokens=4, do_sample=False, stopping_criteria=[hold])

    thread = threading.Thread(target=generate)
    with popmm.pruned(llama, CONFIG):
        thread.start()
        assert begun.wait(10)
        threading.Timer(0.3, go_on.set).start()
    thread.join()
    assert MARKER not in llama.model.__dict__
    assert not any("forward" in vars(module) for module in llama.modules())


def test_detach_forgets_the_length_of_our_static_caches(llama):
    how = dict(max_new_tokens=3, do_sample=False, cache_implementation="static")
    llama.generate(tiny.prompt(5), **how)
    before = vars(llama)[compat.CACHE_LENGTH]
    with popmm.pruned(llama, CONFIG):
        llama.generate(tiny.prompt(9), **how)
    assert vars(llama)[compat.CACHE_LENGTH] == before


def test_of_threads_that_attach_at_once_one_succeeds():
    for _ in range(20):
        model = tiny.dense("llama")
        before = {name: p.clone() for name, p in model.named_parameters()}
        results, barrier = [], threading.Barrier(4)

        def attach(model=model, results=results, barrier=barrier):
            barrier.wait()
            try:
                results.append(popmm.attach(model, CONFIG))
            except RuntimeError as error:
                results.append(str(error))

        threads = [threading.Thread(target=attach) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [r for r in results if isinstance(r, str)]
        assert len(refused) == 3 and all("attached already" in r for r in refused)
        popmm.detach(model)
        assert not any("forward" in vars(module) for module in model.modules())
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_trace_from_another_thread_is_refused_while_the_model_generates(llama):
    errors = []

    def trace(*args, **kwargs):
        def other():
            try:
                with state.trace():
                    pass
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return torch.zeros(1, dtype=torch.bool)

    with popmm.pruned(llama, CONFIG) as state:
        llama.generate(tiny.prompt(9), max_new_tokens=4, do_sample=False, stopping_criteria=[trace])
        assert state.passes["decode"] == 3
    assert errors and all("trace: another thread is running this model" in error for error in errors)

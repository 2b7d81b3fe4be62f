"""What holds in every version of torch and transformers: passes are told apart, and nothing is silently dense."""

from __future__ import annotations

import logging
import re
import subprocess
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from transformers import DynamicCache, StaticCache

import popmm
from popmm import compat
from popmm.runtime.passes import NotPrunedWarning

RATIO = popmm.PopConfig(ffn_ratio=0.5, selection="mask")


@pytest.fixture(scope="module")
def stories():
    model, tokenizer = popmm.zoo.load("stories")
    return model, tokenizer("Once upon a time", return_tensors="pt")


def test_a_generate_decodes_pruned(stories):
    model, inputs = stories
    dense = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    with popmm.pruned(model, ffn_ratio=0.7, selection="mask") as state:
        pruned = model.generate(**inputs, do_sample=False, max_new_tokens=24, min_new_tokens=24)
        assert dict(state.passes) == {"prompt": 1, "decode": 23, "dense": 0}
        assert "1 prompt, 23 decode, 0 dense" in state.summary()
        assert "1 prompt, 23 decode, 0 dense" in repr(state)
    assert not torch.equal(dense, pruned)


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=32)])
def test_a_cache_is_told_by_its_type(llama, make):
    cache = make(config=llama.config)
    with popmm.pruned(llama, RATIO) as state, torch.no_grad():
        llama(tiny.prompt(9), **compat.cache_argument(llama, cache))
        out = llama(tiny.prompt(1, seed=1), **compat.cache_argument(llama, cache))
        assert dict(state.passes) == {"prompt": 1, "decode": 1, "dense": 0}
        assert compat.cache_of(out) is cache


def test_a_cache_under_an_unknown_name_is_found():
    cache = DynamicCache()
    assert compat.find_cache({"input_ids": torch.zeros(1, 1), "kv_store": cache}) is cache
    assert compat.cache_of((torch.zeros(1), cache)) is cache
    assert compat.find_cache({"cache": None, "past_key_values": None}) is None


@pytest.mark.parametrize("name", [*compat.CACHE_NAMES, "cache_params"])
def test_a_cache_of_an_unknown_type_is_refused(name):
    with pytest.raises(TypeError, match=f"{name} of type list: .*DynamicCache"):
        compat.find_cache({name: [torch.zeros(1)]})


def test_two_caches_are_refused():
    with pytest.raises(TypeError, match="two caches"):
        compat.find_cache({"cache": DynamicCache(), "other": DynamicCache()})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(input_ids=torch.zeros(3, dtype=torch.long)), r"input_ids of shape \(3,\)"),
        (dict(inputs_embeds=torch.zeros(3, 32)), r"inputs_embeds of shape \(3, 32\)"),
        (dict(), "neither input_ids nor inputs_embeds"),
    ],
)
def test_a_call_of_an_unreadable_form_raises(llama, call, message):
    with popmm.pruned(llama, RATIO), pytest.raises(ValueError, match=message):
        llama.get_decoder()(**call)


def test_a_generate_without_a_cache_warns_once(llama):
    with popmm.pruned(llama, RATIO) as state:
        with pytest.warns(NotPrunedWarning, match="decoding is dense: .*use_cache=False") as caught:
            llama.generate(tiny.prompt(9), max_new_tokens=5, do_sample=False, use_cache=False)
        assert len(caught) == 1
        assert dict(state.passes) == {"prompt": 5, "decode": 0, "dense": 0}


def test_a_generate_whose_forward_was_replaced_warns(llama):
    decoder = llama.get_decoder()
    with popmm.pruned(llama, RATIO) as state:
        ours = decoder.__dict__["forward"]
        decoder.__dict__["forward"] = ours.__wrapped__
        with pytest.warns(
            NotPrunedWarning, match="forward was replaced while attached, so popmm sees none of its passes"
        ):
            llama.generate(tiny.prompt(9), max_new_tokens=3, do_sample=False)
        assert state.passes.total == 0
        decoder.__dict__["forward"] = ours


def test_nothing_is_warned_of_where_nothing_is_wrong(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotPrunedWarning)
        for config in (RATIO, popmm.PopConfig(ffn_ratio=0.0), RATIO.replace(refresh_every=2)):
            with popmm.pruned(llama, config):
                llama.generate(tiny.prompt(9, batch=2), max_new_tokens=6, do_sample=False)
                llama.generate(tiny.prompt(9), max_new_tokens=1, do_sample=False)
                llama.generate(tiny.prompt(1), max_new_tokens=4, do_sample=False, num_beams=2)


def test_refreshes_are_counted_as_dense_with_their_reason(llama):
    with popmm.pruned(llama, RATIO.replace(refresh_every=2)) as state:
        llama.generate(tiny.prompt(9), max_new_tokens=7, do_sample=False)
        assert dict(state.passes) == {"prompt": 1, "decode": 4, "dense": 2}
        assert "2 x refreshes the partition (refresh_every=2)" in state.summary()


def test_compiled_steps_are_counted(llama):
    ids, how = tiny.prompt(9), dict(do_sample=False, max_new_tokens=6, cache_implementation="static")
    with popmm.pruned(llama, RATIO) as state:
        before = dict(state.passes)
        llama.generate(ids, **how)
        assert state.passes["decode"] == before["decode"] + 5

        def unseen(*args, **kwargs):
            return "output"

        cache = compat.cache_of(llama(ids))
        step = _with_step(llama, state, unseen)
        assert step(input_ids=tiny.prompt(1), **compat.cache_argument(llama, cache)) == "output"
        assert state.passes["decode"] == before["decode"] + 6


def _with_step(model, state, step):
    from popmm.runtime.wrappers import compiled

    class Holder:
        def get_compiled_call(self, config):
            return step

    return compiled(Holder().get_compiled_call, state._runner)(None)


def test_our_own_calls_are_not_deprecated(stories, caplog):
    model, inputs = stories
    logging.getLogger("transformers").propagate = True
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        with popmm.pruned(model, ffn_ratio=0.5):
            model.generate(**inputs, do_sample=False, max_new_tokens=4)
            model.generate(**inputs, do_sample=False, max_new_tokens=4, num_beams=2, cache_implementation="static")
    said = [str(w.message) for w in caught] + [record.getMessage() for record in caplog.records]
    assert not [text for text in said if re.search("deprecat|renamed", text)]


def test_internals_of_transformers_stand_in_one_file():
    rooms = [Path(popmm.__file__).parent, Path(popmm.adapters.__file__).parent]
    private = re.compile(
        r"transformers\.(integrations|cache_utils|generation\.utils|modeling_utils)|\._experts_impl|\"_experts_impl"
        r"|hf_device_map|_hf_hook|_previous_max_cache_length|past_key_values|\.hf_quantizer"
    )
    found = [
        f"{file.name}:{number}: {line.strip()}"
        for room in rooms
        for file in room.rglob("*.py")
        if file.parent.name != "compat"
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if private.search(line.split("#")[0])
    ]
    assert not found, "\n".join(found)


def test_a_version_without_an_internal_step_warns():
    from transformers import GenerationMixin

    class Bare(torch.nn.Module, GenerationMixin):
        pass

    with pytest.warns(UserWarning, match="has no GenerationMixin._no_such_step"):
        assert compat.internal(Bare(), "_no_such_step") is None


ROOT = Path(__file__).parent.parent


def _bounds() -> dict[str, str]:
    return dict(re.findall(r'"(torch|transformers|torchvision)>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text()))


def test_the_oldest_versions_are_the_lower_bounds():
    asked = subprocess.run(["make", "-n", "test-oldest"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if "pip install" not in asked:  # the environment is there already
        asked = subprocess.run(["make", "-Bn", "test-oldest"], cwd=ROOT, capture_output=True, text=True).stdout
    assert dict(re.findall(r"'([a-z]+)==([0-9.]+)\.\*'", asked)) == _bounds()


def test_the_tested_versions_lie_within_the_bounds():
    locked = dict(re.findall(r"^([a-z]+)==([0-9.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))

    def number(version: str) -> tuple[int, ...]:
        return tuple(map(int, version.split(".")))

    assert all(number(locked[name]) >= number(bound) for name, bound in _bounds().items())

"""Weights in reading order, in place: the same function as copied ones, and exact bytes afterwards."""

import itertools
import os
import signal

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import popmm
from popmm.compat import compiled_anywhere
from popmm.layouts.permute import region_moves

CONFIG = popmm.PopConfig(ffn_ratio=0.4, candidate_fraction=0.2, layout="permute")
COPY = CONFIG.replace(layout="copy")
MODELS = {
    **{name: lambda name=name: tiny.dense(name) for name in ("llama", "llama-bias", "phi3", "gemma3", "glm4")},
    **{name: lambda name=name: tiny.moe(name) for name in ("mixtral", "qwen2-moe", "deepseek-v3", "gpt-oss")},
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bytes(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@torch.no_grad()
def decode(model, prompt, continuation):
    cache = model(prompt).past_key_values
    return torch.cat([model(token.view(1, 1), past_key_values=cache).logits[0] for token in continuation])


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 4), st.lists(st.integers(0, 2), min_size=1, max_size=30), st.randoms())
def test_moves_are_the_fewest_that_do(n_experts, regions, generator):
    now = torch.tensor([regions] * n_experts)
    wanted = now.clone()
    for row in wanted:
        order = list(range(len(regions)))
        generator.shuffle(order)
        row.copy_(row[order])
    expert, here, there = region_moves(now, wanted)
    assert len(here) == int((now != wanted).sum())
    assert {*zip(expert.tolist(), here.tolist())} == {*zip(expert.tolist(), there.tolist())}
    moved = wanted.clone()
    moved[expert, there] = wanted[expert, here]
    assert torch.equal(moved, now)


def test_bytes_are_exact_after_50_prompts(model):
    before = weights(model)
    with popmm.pruned(model, CONFIG) as state:
        for seed in range(50):
            model.generate(tiny.prompt(4 + seed % 9, seed=seed), max_new_tokens=2, do_sample=False)
        assert not all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert "layout=permute" in state.summary()
    assert_same_bytes(model, before)


def test_decode_reads_the_models_own_weights(model):
    with popmm.pruned(model, CONFIG) as state:
        model.generate(tiny.prompt(9), max_new_tokens=2)
        storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for ffn in state._ffns:
            assert all(w.untyped_storage().data_ptr() in storages for w in ffn.layout.weights[:3])
        # its place; its norms; fingerprints and norms of three weights and two biases
        per_channel = 8 + 4 * (2 + 2 * 5)
        floats = sum(per_channel * ffn.layout.norms.numel() for ffn in state._ffns)
        assert state.buffer_bytes() <= floats


class FailsAt(TorchDispatchMode):
    """Raises once, at the n-th operation that reads or writes by index."""

    def __init__(self, n, error):
        self.left, self.error = n, error

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::index", "aten::index_put_"):
            self.left -= 1
            if self.left == 0:
                raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name, error",
    [
        ("llama-bias", RuntimeError("out of memory")),
        ("phi3", KeyboardInterrupt()),
        ("mixtral", RuntimeError("out of memory")),
        ("gpt-oss", KeyboardInterrupt()),
    ],
)
def test_a_failure_at_any_step_leaves_the_function_as_it_was(name, error):
    model = MODELS[name]()
    before, ids = weights(model), tiny.prompt(9)
    dense = model(ids).logits
    failures = 0
    for n in itertools.count(1):
        with popmm.pruned(model, CONFIG) as state:
            model.generate(tiny.prompt(11, seed=3), max_new_tokens=2, do_sample=False)
            sequence = model(tiny.prompt(12, seed=4)).past_key_values._popmm_sequence
            model(tiny.prompt(11, seed=3))
            try:
                with FailsAt(n, error) as mode:
                    state._runner.partitions.activate(sequence)
            except (RuntimeError, KeyboardInterrupt) as raised:
                assert raised is error and not state.ready
                failures += 1
                torch.testing.assert_close(model(ids).logits, dense, atol=2e-5, rtol=1e-4)
                model.generate(tiny.prompt(11, seed=3), max_new_tokens=2, do_sample=False)
        assert_same_bytes(model, before)
        if mode.left > 0:
            break
    assert failures >= 8


def test_ctrl_c_waits_for_the_end_of_a_permutation(llama, monkeypatch):
    plain = torch.Tensor.__setitem__
    calls = []

    def press(self, *args):
        plain(self, *args)
        calls.append(self)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    before = weights(llama)
    with popmm.pruned(llama, CONFIG) as state:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(torch.Tensor, "__setitem__", press)
            llama(tiny.prompt(9))
        assert len(calls) >= 7 and not state.ready
    assert_same_bytes(llama, before)


@pytest.mark.parametrize("assign", [False, True])
def test_reloaded_weights_are_taken_as_they_come(llama, assign):
    other = tiny.build(tiny.DENSE["llama"], seed=3)
    ids, continuation = tiny.prompt(9), tiny.prompt(3, seed=1)[0]
    with popmm.pruned(other, COPY):
        expected = decode(other, ids, continuation)
    with popmm.pruned(llama, CONFIG):
        llama.generate(ids, max_new_tokens=2)
        llama.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=assign)
        torch.testing.assert_close(decode(llama, ids, continuation), expected, atol=2e-5, rtol=1e-4)
    assert_same_bytes(llama, weights(other))


@pytest.mark.parametrize("part", ["down_proj", "gate_proj", "up_proj"])
def test_a_part_that_is_loaded_again_takes_the_rest_with_it(llama, part):
    before, ids = weights(llama), tiny.prompt(9)
    dense = llama(ids).logits
    with popmm.pruned(llama, CONFIG):
        llama.generate(ids, max_new_tokens=2)
        llama.load_state_dict({k: v for k, v in before.items() if part in k}, strict=False)
        torch.testing.assert_close(llama(ids).logits, dense, atol=2e-5, rtol=1e-4)
        llama.generate(ids, max_new_tokens=2)
    assert_same_bytes(llama, before)


def test_writes_that_change_nothing_keep_the_order(llama):
    before = weights(llama)
    with popmm.pruned(llama, CONFIG), torch.no_grad():
        llama.generate(tiny.prompt(9), max_new_tokens=2)
        llama.model.layers[0].mlp.down_proj.weight.mul_(1)
        llama.load_state_dict({k: v.clone() for k, v in llama.state_dict().items()})
        llama.generate(tiny.prompt(7), max_new_tokens=2)
        llama.model.layers[1].mlp.up_proj.weight.mul_(1)
    assert_same_bytes(llama, before)


def test_swapping_parameters_keeps_the_order(llama):
    before = weights(llama)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with popmm.pruned(llama, CONFIG):
            llama.generate(tiny.prompt(9), max_new_tokens=2)
            llama.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same_bytes(llama, before)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_detach_that_fails_can_be_tried_again(name):
    model = MODELS[name]()
    before = weights(model)
    popmm.attach(model, CONFIG)
    model.generate(tiny.prompt(9), max_new_tokens=2, do_sample=False)
    with pytest.raises(RuntimeError, match="out of memory"), FailsAt(5, RuntimeError("out of memory")):
        popmm.detach(model)
    model.generate(tiny.prompt(9), max_new_tokens=2, do_sample=False)
    with pytest.raises(RuntimeError, match="out of memory"), FailsAt(5, RuntimeError("out of memory")):
        popmm.detach(model)
    popmm.detach(model)
    assert_same_bytes(model, before)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_model_moved_to_another_dtype_comes_back_in_its_own_order(llama):
    before = weights(llama)
    with popmm.pruned(llama, CONFIG):
        llama.generate(tiny.prompt(9), max_new_tokens=2)
        llama.double()
        llama.generate(tiny.prompt(7), max_new_tokens=2)
    assert_same_bytes(llama.float(), before)


def test_auto_says_what_it_chose_and_permute_is_refused_where_it_is_not_safe(llama):
    with popmm.pruned(llama, ffn_ratio=0.4) as state:
        assert "layout=copy" in state.summary()  # the faster one on the CPU
    llama.model.layers[0].mlp.up_proj.weight = llama.model.layers[1].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"layers\.0\.mlp shares up_proj\.weight with another module"):
        popmm.attach(llama, CONFIG)
    with torch.inference_mode():
        loaded = tiny.dense("llama")
    with pytest.raises(ValueError, match="loaded in inference mode, so gate_proj.weight cannot be written"):
        popmm.attach(loaded, CONFIG)
    popmm.attach(loaded, COPY)
    popmm.detach(loaded)


def test_compiled_steps_serve_all_prompts_without_recompiling(llama):
    from torch._dynamo.utils import counters

    compile_config = compiled_anywhere(fullgraph=True, backend="eager")
    how = dict(cache_implementation="static", max_length=40, do_sample=False)
    prompts = [tiny.prompt(n, seed=n) for n in range(5, 15)]
    torch._dynamo.reset()
    with popmm.pruned(llama, CONFIG):
        eager = [llama.generate(ids, **how) for ids in prompts]
        graphs = []
        for ids, tokens in zip(prompts, eager):
            assert torch.equal(llama.generate(ids, **how, compile_config=compile_config), tokens)
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * len(prompts)


def test_partition_time_is_that_of_moving_the_channels(llama, monkeypatch):
    from popmm.layouts.permute import PermuteLayout

    moved, plain = [], PermuteLayout._move

    def count(self, source, expert, here, there):
        moved.append(len(here))
        plain(self, source, expert, here, there)

    with popmm.pruned(llama, CONFIG) as state:
        llama.generate(tiny.prompt(9), max_new_tokens=2)
        before = {k: (p.retained, p.candidate) for k, p in state.layers.items()}
        monkeypatch.setattr(PermuteLayout, "_move", count)
        assert state.partition_seconds() > 0
        assert state.ready and all(n > 0 for n in moved) and len(moved) == 4  # home, and there again
        after = {k: (p.retained, p.candidate) for k, p in state.layers.items()}
        assert all(torch.equal(a, b) for k in before for a, b in zip(before[k], after[k]))

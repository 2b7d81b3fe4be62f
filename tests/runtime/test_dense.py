"""Attach, generate, detach on every dense architecture, against the independent computation."""

import independent
import pytest
import tiny
import torch

import popmm

WITHOUT_BIAS = [name for name in tiny.DENSE if name != "llama-bias"]


@pytest.fixture(params=tiny.DENSE)
def model(request):
    return tiny.dense(request.param)


@pytest.mark.parametrize("name", WITHOUT_BIAS)
@pytest.mark.parametrize("importance", ["wanda", "griffin", "flock"])
def test_partition_and_decode_equal_the_reference(name, importance):
    model = tiny.dense(name)
    ids, continuation = tiny.prompt(12)[0], tiny.prompt(6, seed=1)[0]
    config = popmm.PopConfig(ffn_ratio=0.45, candidate_fraction=0.2, importance=importance)
    with popmm.pruned(model, config) as state:
        logits = independent.steps(model, ids, continuation)
        layers = dict(state.layers)
    budget = round(0.55 * 80)
    expected = independent.prompt_partitions(model, [ids], budget, 0.2, importance)
    assert list(layers) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert [independent.channels(p) for p in layers.values()] == expected
    reference = independent.decode_logits(model, ids, continuation, expected, budget, importance=importance)
    torch.testing.assert_close(logits, reference, atol=1e-4, rtol=0)
    dense = independent.steps(model, ids, continuation)
    assert (reference - dense).abs().max() > 1e-2  # pruning shows, so the comparison means something


@pytest.mark.parametrize("name", WITHOUT_BIAS)
def test_keep_lets_all_of_r_and_c_pass(name):
    model = tiny.dense(name)
    ids, continuation = tiny.prompt(12)[0], tiny.prompt(4, seed=1)[0]
    with popmm.pruned(model, ffn_ratio=0.45, candidate_fraction=0.2, selection="keep"):
        logits = independent.steps(model, ids, continuation)
    partitions = independent.prompt_partitions(model, [ids], 44, 0.2)
    reference = independent.decode_logits(model, ids, continuation, partitions, 44, keep=True)
    torch.testing.assert_close(logits, reference, atol=1e-4, rtol=0)


def test_biases_are_pruned_with_their_channels():
    model = tiny.dense("llama-bias")
    ids, token = tiny.prompt(12), tiny.prompt(1, seed=1)
    mlp = model.model.layers[0].mlp
    inputs = []
    handle = mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    outputs = []
    after = mlp.register_forward_hook(lambda module, args, output: outputs.append(output))
    with popmm.pruned(model, ffn_ratio=0.5, selection="keep") as state, torch.no_grad():
        cache = model(ids).past_key_values
        model(token, past_key_values=cache)
        p = state.layers["model.layers.0.mlp"]
    handle.remove()
    after.remove()
    on = torch.zeros(80)
    on[torch.cat([p.retained, p.candidate])] = 1
    h = mlp.act_fn(mlp.gate_proj(inputs[-1])) * mlp.up_proj(inputs[-1])
    torch.testing.assert_close(outputs[-1], mlp.down_proj(h * on), atol=1e-5, rtol=1e-5)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_untouched(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    for module in model.modules():
        assert not {"forward", "generate"} & set(module.__dict__)
        assert not [key for key in module.__dict__ if "popmm" in key]
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_pruned_detaches_when_its_body_raises(llama):
    before = snapshot(llama)
    with pytest.raises(KeyError), popmm.pruned(llama):
        llama.generate(tiny.prompt(9), max_new_tokens=3)
        raise KeyError("body")
    assert_untouched(llama, before)


def test_each_sequence_of_a_batch_has_its_own_mask(llama):
    with popmm.pruned(llama, ffn_ratio=0.4, candidate_fraction=0.5) as state, state.trace() as trace:
        llama.generate(tiny.prompt(9, batch=2), max_new_tokens=4, do_sample=False)
        assert any((mask[:, 0] != mask[:, 1]).any() for mask in trace.values())


@torch.no_grad()
def test_prefill_pruned_turns_the_pruned_channels_off_in_the_prompt(llama):
    ids = tiny.prompt(12)
    with popmm.pruned(llama, ffn_ratio=0.5, prefill="pruned", selection="mask") as state:
        logits = llama(ids).logits
        p = state.layers["model.layers.0.mlp"]
        layers = [independent.channels(layer) for layer in state.layers.values()]
    first = independent.prompt_partitions(llama, [ids[0]], 40)[0]
    assert independent.channels(p) == first
    with independent.masked(llama, layers, 40, keep=True):
        torch.testing.assert_close(logits, llama(ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_fill_mean_stands_in_with_the_prompt_mean(llama):
    ids, token = tiny.prompt(12), tiny.prompt(1, seed=3)
    with independent.captured(llama) as seen:
        llama(ids)
    mlp = llama.model.layers[0].mlp
    mean = seen[0][0].mean(0)
    inputs, outputs = [], []
    handles = [
        mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0])),
        mlp.register_forward_hook(lambda module, args, output: outputs.append(output)),
    ]
    with popmm.pruned(llama, ffn_ratio=0.5, fill="mean", candidate_fraction=0.3) as state, state.trace() as trace:
        cache = llama(ids).past_key_values
        llama(token, past_key_values=cache)
        passed = trace["model.layers.0.mlp"][0, 0]
    for handle in handles:
        handle.remove()
    h = mlp.act_fn(mlp.gate_proj(inputs[-1])) * mlp.up_proj(inputs[-1])
    expected = mlp.down_proj(torch.where(passed, h, mean))
    torch.testing.assert_close(outputs[-1], expected, atol=1e-5, rtol=1e-4)


def test_callable_importance_ranks_channels(llama):
    def high_numbers_first(h, down_norm):
        return torch.arange(h.shape[-1], dtype=torch.float32).expand_as(h)

    with popmm.pruned(llama, ffn_ratio=0.5, importance=high_numbers_first) as state:
        llama.generate(tiny.prompt(5), max_new_tokens=1)
        p = state.layers["model.layers.0.mlp"]
        assert p.retained.tolist() == list(range(79, 79 - len(p.retained), -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_float32_statistics(dtype):
    model = tiny.build(tiny.DENSE["llama"], dtype=dtype)
    ids = tiny.prompt(12)
    with popmm.pruned(model, ffn_ratio=0.5, selection="mask") as state:
        model.generate(ids, max_new_tokens=4, do_sample=False)
        partition = state.layers["model.layers.0.mlp"]
    assert partition.importance.dtype == torch.float32
    assert independent.channels(partition) == independent.prompt_partitions(model, [ids[0]], 40)[0]


def test_skipped_layers_stay_dense(llama):
    with popmm.pruned(llama, pruning_ratio=0.2, skip_layers=(0,)) as state:
        llama.generate(tiny.prompt(9), max_new_tokens=2)
        assert list(state.layers) == ["model.layers.1.mlp"]
        pruned, dense = state.bytes_per_token()
        one = 3 * 80 * 32 * 4
        assert dense == 2 * one
        assert one < pruned < 2 * one


def test_bytes_per_token_counts_what_each_selection_reads(llama):
    channel = 3 * 32 * 4
    for selection, channels in (("keep", 48 + 4), ("mask", (2 * 52 + 48) / 3)):
        with popmm.pruned(llama, ffn_ratio=0.4, selection=selection) as state:
            assert state.bytes_per_token() == (round(2 * channels * channel), 2 * 80 * channel)
    with popmm.pruned(llama, pruning_ratio=0.0) as state:
        assert state.bytes_per_token() == (2 * 80 * channel,) * 2

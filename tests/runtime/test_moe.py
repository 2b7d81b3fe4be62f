"""Experts: one partition each, from the tokens routed to it; against loops over the model's own weights."""

import itertools
from contextlib import contextmanager

import pytest
import tiny
import torch
from independent_experts import expert_down, expert_h, experts_of, routed

import popmm
from popmm.compat import compiled_anywhere
from popmm.method import reference

RATIO = 0.4
CONFIG = popmm.PopConfig(ffn_ratio=RATIO, candidate_fraction=0.2, prior_tokens=0)
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]


@torch.no_grad()
def expected_partitions(model, prompts, budget, fraction=0.2, importance="wanda", router=False):
    """{name: [(R, C, P) or None per expert]} from unpadded prompts, pooled; None = no token came."""
    rows = {name: {} for name in experts_of(model)}
    for ids in prompts:
        with routed(model) as seen:
            model(ids[None])
        for name, calls in seen.items():
            for x, index, weight in calls:
                for t, k in itertools.product(range(len(x)), range(index.shape[1])):
                    scale = weight[t, k] if router else 1.0
                    rows[name].setdefault(int(index[t, k]), []).append((x[t], scale))
    result = {}
    for name, module in experts_of(model).items():
        regions = []
        for expert in range(module.num_experts):
            if expert not in rows[name]:
                regions.append(None)
                continue
            x = torch.stack([x for x, _ in rows[name][expert]])
            scale = torch.stack([torch.as_tensor(s) for _, s in rows[name][expert]])
            h = expert_h(module, expert, x) * scale[:, None]
            scores = reference.prompt_importance(importance, h, expert_down(module, expert))
            regions.append(reference.partition(scores, budget, fraction))
        result[name] = regions
    return result


def assert_partitions(state, expected):
    for name, regions in expected.items():
        p = state.layers[name]
        for expert, region in enumerate(regions):
            if region is not None:
                found = tuple(getattr(p, part)[expert].tolist() for part in ("retained", "candidate", "pruned"))
                assert found == region, (name, expert)


@contextmanager
def reference_experts(model, layers, budget, keep=False):
    """Experts run by loops, one mask per (token, expert) pair, from given FFNPartitions."""

    def make(module, p):
        def forward(x, index, weight):
            out = torch.zeros_like(x)
            for t, k in itertools.product(range(len(x)), range(index.shape[1])):
                e = int(index[t, k])
                h, down = expert_h(module, e, x[t : t + 1])[0], expert_down(module, e)
                retained, candidate = p.retained[e].tolist(), p.candidate[e].tolist()
                if keep:
                    mask = torch.zeros(len(h), dtype=torch.bool)
                    mask[retained + candidate] = True
                else:
                    mask = reference.decode_mask(h, down, retained, candidate, budget)
                y = down @ (h * mask)
                if module.has_bias:
                    y = y + module.down_proj_bias[e]
                out[t] += weight[t, k] * y
            return out

        return forward

    for name, module in experts_of(model).items():
        module.forward = make(module, layers[name])
    try:
        yield
    finally:
        for module in experts_of(model).values():
            del module.forward


@torch.no_grad()
def steps(model, prompt, continuation, decoding=None):
    cache = model(prompt[None], use_cache=True).past_key_values
    logits = []
    with decoding() if decoding else torch.no_grad():
        for token in continuation:
            logits.append(model(token.view(1, 1), past_key_values=cache).logits[0, -1])
    return torch.stack(logits)


@pytest.fixture(params=tiny.MOE)
def name(request):
    return request.param


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_partitions_equal_a_per_expert_computation(name, implementation):
    model = tiny.moe(name, implementation)
    ids = tiny.prompt(20)
    with popmm.pruned(model, CONFIG) as state:
        assert model.config._experts_implementation == "popmm"
        model.generate(ids, max_new_tokens=2, do_sample=False)
    assert model.config._experts_implementation == implementation
    names = list(experts_of(model))
    assert [n for n in state.layers if n.endswith("experts")] == names
    expected = expected_partitions(model, [ids[0]], round((1 - RATIO) * 48))
    assert sum(r is not None for regions in expected.values() for r in regions) > 3
    assert_partitions(state, expected)


def test_tokens_counts_what_was_routed(name):
    model = tiny.moe(name)
    ids = tiny.prompt(20)
    with popmm.pruned(model, CONFIG) as state, routed(model) as seen:
        model.generate(ids, max_new_tokens=1, do_sample=False)
    for layer, calls in seen.items():
        _, index, _ = calls[0]
        tokens = state.layers[layer].tokens
        assert tokens.dtype == torch.int64
        assert tokens.tolist() == [int((index == e).sum()) for e in range(len(tokens))]


@pytest.mark.parametrize("selection", ["mask", "keep"])
def test_decode_equals_a_loop_over_pairs(name, selection):
    model = tiny.moe(name)
    ids, continuation = tiny.prompt(20)[0], tiny.prompt(6, seed=1)[0]
    config = CONFIG.replace(
        selection=selection, shared_experts="dense", skip_layers=(0,) if name == "deepseek-v3" else ()
    )
    with popmm.pruned(model, config) as state:
        logits = steps(model, ids, continuation)
    budget = round((1 - RATIO) * 48)

    def decoding():
        return reference_experts(model, state.layers, budget, keep=selection == "keep")

    expected = steps(model, ids, continuation, decoding)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert (expected - steps(model, ids, continuation)).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("prefill", ["dense", "pruned"])
def test_ratio_zero_equals_dense_exactly(name, prefill, implementation):
    model = tiny.moe(name, implementation)
    ids = tiny.prompt(9)
    dense = model.generate(ids, max_new_tokens=6, do_sample=False)
    logits = steps(model, ids[0], dense[0, 9:])
    with popmm.pruned(model, pruning_ratio=0.0, prefill=prefill) as state:
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), dense)
        assert torch.equal(steps(model, ids[0], dense[0, 9:]), logits)
        assert state.ready


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dense_prefill_is_untouched(name, implementation):
    model = tiny.moe(name, implementation)
    ids = tiny.prompt(9)
    with torch.no_grad():
        dense = model(ids).logits
        with popmm.pruned(model, CONFIG):
            assert torch.equal(model(ids).logits, dense)


def test_padding_and_batch_order_do_not_matter(name):
    model = tiny.moe(name)
    short, long = tiny.prompt(7, seed=1)[0], tiny.prompt(15, seed=2)[0]
    pad = len(long) - len(short)
    ids = torch.stack([torch.nn.functional.pad(short, (pad, 0)), long])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(short), (pad, 0)), torch.ones_like(long)])
    expected = expected_partitions(model, [short, long], round((1 - RATIO) * 48))
    with popmm.pruned(model, CONFIG) as state:
        for order in ([0, 1], [1, 0]):
            for cache in ("dynamic", "static"):
                model.generate(
                    ids[order],
                    attention_mask=mask[order],
                    max_new_tokens=2,
                    do_sample=False,
                    cache_implementation=cache,
                )
                assert_partitions(state, expected)


def test_pruned_prefill_turns_each_experts_pruned_channels_off():
    outputs = {}
    for implementation in IMPLEMENTATIONS:
        model = tiny.moe("mixtral", implementation)
        ids = tiny.prompt(20)
        with torch.no_grad(), popmm.pruned(model, CONFIG.replace(prefill="pruned")) as state:
            outputs[implementation] = model(ids).logits
            layers = dict(state.layers)
        with torch.no_grad(), reference_experts(model, layers, 0, keep=True):
            torch.testing.assert_close(outputs[implementation], model(ids).logits, atol=1e-4, rtol=0)


def test_routed_importance_weighs_by_the_router():
    model = tiny.moe("mixtral")
    ids = tiny.prompt(20)
    with popmm.pruned(model, CONFIG.replace(importance="routed")) as state:
        model.generate(ids, max_new_tokens=1)
    expected = expected_partitions(model, [ids[0]], round((1 - RATIO) * 48), router=True)
    assert_partitions(state, expected)
    assert expected != expected_partitions(model, [ids[0]], round((1 - RATIO) * 48))


def test_unseen_experts_have_the_priors_partition_and_decode_sensibly():
    model = tiny.moe("mixtral")
    ids = tiny.prompt(1)
    experts = model.model.layers[0].mlp.experts
    with popmm.pruned(model, CONFIG) as state, routed(model) as seen, state.trace() as trace, torch.no_grad():
        cache = model(ids).past_key_values
        tokens = state.layers["model.layers.0.mlp.experts"].tokens
        logits = [model(t.view(1, 1), past_key_values=cache).logits for t in tiny.prompt(30, seed=5)[0]]
    unseen = [e for e in range(6) if tokens[e] == 0]
    assert len(unseen) == 4
    used = {int(e) for _, index, _ in seen["model.layers.0.mlp.experts"][1:] for e in index.flatten()}
    assert used & set(unseen), "decode reached no expert that the prompt had not seen"
    assert all(torch.isfinite(step).all() for step in logits)
    assert trace["model.layers.0.mlp.experts"].any()
    p = state.layers["model.layers.0.mlp.experts"]
    for e in unseen:
        gate, up = experts.gate_up_proj[e].chunk(2)
        prior = gate.norm(dim=1) * up.norm(dim=1) * experts.down_proj[e].norm(dim=0)
        assert p.retained[e].tolist() == prior.argsort(descending=True)[: p.retained.shape[1]].tolist()


def test_prior_weighs_less_the_more_tokens_came():
    model = tiny.moe("mixtral")
    ids = tiny.prompt(20)
    moved = []
    for n0 in (0.0, 1.0, 1e9):
        with popmm.pruned(model, CONFIG.replace(prior_tokens=n0)) as state:
            model.generate(ids, max_new_tokens=1)
            moved.append(state.layers["model.layers.0.mlp.experts"].retained.tolist())
    assert moved[0] != moved[2] and moved[1] != moved[2]


def test_shared_experts_are_pruned_on_request():
    model = tiny.moe("qwen2-moe")
    with popmm.pruned(model, pruning_ratio=0.2) as state:
        model.generate(tiny.prompt(9), max_new_tokens=2)
        assert [n for n in state.layers if "shared" in n] == []
        alone = state.ffn_ratio
    with popmm.pruned(model, pruning_ratio=0.2, shared_experts="prune") as state, state.trace() as trace:
        model.generate(tiny.prompt(9, batch=2), max_new_tokens=3, do_sample=False)
        assert "model.layers.0.mlp.shared_expert" in state.layers
        assert (
            trace["model.layers.0.mlp.shared_expert"].sum(-1) == state.layers["model.layers.0.mlp.shared_expert"].budget
        ).all()
        assert state.ffn_ratio < alone  # the shared expert takes its part of the budget


def test_dense_first_layers_are_the_dense_adapters():
    model = tiny.moe("deepseek-v3")
    with popmm.pruned(model, CONFIG) as state:
        model.generate(tiny.prompt(9), max_new_tokens=2)
        assert list(state.layers) == ["model.layers.0.mlp", "model.layers.1.mlp.experts"]


def test_bytes_per_token_counts_activated_experts():
    model = tiny.moe("mixtral")
    with popmm.pruned(model, CONFIG.replace(selection="keep")) as state:
        p, d = state.bytes_per_token()
    read = round(0.6 * 48) + 5
    assert (p, d) == (2 * 2 * 3 * 32 * 4 * read, 2 * 2 * 3 * 32 * 4 * 48)


@pytest.mark.parametrize("selection", ["mask", "keep"])
@pytest.mark.parametrize("skip_layers", [(), (0,)])
def test_compiled_decode_equals_eager(selection, skip_layers):

    model = tiny.moe("qwen3-moe")
    compile_config = compiled_anywhere(fullgraph=True, backend="eager")
    settings = dict(cache_implementation="static", max_length=40, do_sample=False)
    with popmm.pruned(model, CONFIG.replace(selection=selection, skip_layers=skip_layers)):
        for n in (5, 9):
            ids = tiny.prompt(n, seed=n, batch=2)
            eager = model.generate(ids, **settings)
            assert torch.equal(model.generate(ids, **settings, compile_config=compile_config), eager)


def test_skipped_layers_run_their_former_implementation():
    model = tiny.moe("mixtral", "batched_mm")
    ids = tiny.prompt(9)
    with popmm.pruned(model, ffn_ratio=0.0, skip_layers=(1,)):
        inside = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(inside, model.generate(ids, max_new_tokens=5, do_sample=False))


def test_top_1_routing_finds_the_right_rows():
    for d_model, n_experts in ((32, 3), (32, 7), (32, 8), (64, 2)):
        config = tiny.MOE["qwen3-moe"].to_dict()
        config.update(hidden_size=d_model, num_experts=n_experts, num_experts_per_tok=1)
        model = tiny.build(type(tiny.MOE["qwen3-moe"])(**config))
        model.set_experts_implementation("grouped_mm")
        ids = tiny.prompt(20)
        with popmm.pruned(model, CONFIG) as state:
            model.generate(ids, max_new_tokens=1)
        assert_partitions(state, expected_partitions(model, [ids[0]], round((1 - RATIO) * 48)))


def test_models_that_share_a_configuration_are_independent():
    config = tiny.MOE["mixtral"].__class__(**tiny.MOE["mixtral"].to_dict())
    one, two = tiny.build(config), tiny.build(config, seed=1)
    assert one.config is two.config
    one.set_experts_implementation("batched_mm")
    ids = tiny.prompt(9)
    dense = two.generate(ids, max_new_tokens=5, do_sample=False)
    popmm.attach(one, CONFIG)
    assert torch.equal(two.generate(ids, max_new_tokens=5, do_sample=False), dense)
    state = popmm.attach(two, CONFIG.replace(skip_layers=(0,)))
    popmm.detach(one)
    with state.trace() as trace:
        two.generate(ids, max_new_tokens=5, do_sample=False)
    assert len(trace["model.layers.1.mlp.experts"]) == 4
    popmm.detach(two)
    assert config._experts_implementation == "batched_mm"


def test_setting_another_implementation_while_attached_is_refused():
    model = tiny.moe("mixtral")
    popmm.attach(model, CONFIG)
    model.set_experts_implementation("batched_mm")
    with pytest.raises(
        RuntimeError, match=r"experts implementation was set to 'batched_mm' while the model was attached"
    ):
        model.generate(tiny.prompt(9), max_new_tokens=2)
    popmm.detach(model)
    assert model.config._experts_implementation == "batched_mm"


def test_ratio_zero_leaves_the_implementation_alone():
    model = tiny.moe("mixtral", "grouped_mm")
    with popmm.pruned(model, pruning_ratio=0.0) as state, state.trace() as trace:
        assert model.config._experts_implementation == "grouped_mm"
        model.generate(tiny.prompt(9), max_new_tokens=3)
    assert set(trace["model.layers.0.mlp.experts"].sum(-1).unique().tolist()) == {0, 48}


def test_tokens_routed_with_weight_zero_do_not_count():
    model = tiny.moe("mixtral")
    router = model.model.layers[0].mlp.gate
    plain = router.forward

    def skip_some(x):
        logits, weight, index = plain(x)
        weight = weight.clone()
        weight[:4] = 0.0
        return logits, weight, index

    router.forward = skip_some
    with popmm.pruned(model, CONFIG) as state:
        model.generate(tiny.prompt(9), max_new_tokens=1)
        assert state.layers["model.layers.0.mlp.experts"].tokens.sum() == 5 * 2


def test_a_layer_whose_experts_read_no_token_has_the_priors_partition():
    model = tiny.moe("mixtral")
    router = model.model.layers[0].mlp.gate
    plain = router.forward

    def skip_all(x):
        logits, weight, index = plain(x)
        return logits, torch.zeros_like(weight), index

    router.forward = skip_all
    with popmm.pruned(model, CONFIG) as state:
        output = model.generate(tiny.prompt(9), max_new_tokens=3, do_sample=False)
        p = state.layers["model.layers.0.mlp.experts"]
    assert output.shape == (1, 12) and p.tokens.sum() == 0
    experts = model.model.layers[0].mlp.experts
    for e in range(6):
        gate, up = experts.gate_up_proj[e].chunk(2)
        prior = gate.norm(dim=1) * up.norm(dim=1) * experts.down_proj[e].norm(dim=0)
        assert p.retained[e].tolist() == prior.argsort(descending=True)[: p.retained.shape[1]].tolist()


def test_the_router_says_how_many_experts_are_active():
    model = tiny.moe("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 3
    with popmm.pruned(model, pruning_ratio=0.0) as state:
        assert state.bytes_per_token() == (2 * 3 * 48 * 3 * 32 * 4,) * 2


def test_autocast_works_on_experts():
    model = tiny.moe("mixtral")
    with popmm.pruned(model, CONFIG), torch.autocast("cpu", torch.bfloat16):
        output = model.generate(tiny.prompt(9), max_new_tokens=4, do_sample=False)
    assert output.shape == (1, 13)


def test_experts_that_compute_something_else_are_refused():
    model = tiny.moe("mixtral")
    experts = model.model.layers[1].mlp.experts
    act = experts.act_fn
    experts.is_transposed = True
    with pytest.raises((popmm.UnsupportedModelError, RuntimeError)):
        popmm.attach(model)
    experts.is_transposed = False
    experts.act_fn = act
    assert not [key for m in model.modules() for key in m.__dict__ if "popmm" in key]

"""Gate first: against loops over the model's own weights, for FFNs and experts."""

import itertools
from contextlib import contextmanager, nullcontext

import independent
import independent_experts
import pytest
import tiny
import torch

import popmm
from popmm.compat import compiled_anywhere
from popmm.kernels.twin import dequantise, quantise
from popmm.layouts.gate import GateLayout
from popmm.method.budget import gate_sizes
from popmm.method.ffn import FFNWeights

DENSE = ("llama", "llama-bias", "phi3", "gemma3")
MOE = ("mixtral", "qwen2-moe", "deepseek-v3", "gpt-oss")
CONFIG = popmm.PopConfig(selection="gate", gate_bits=16, ffn_ratio=0.5, prior_tokens=0)
SETTINGS = [
    {},
    {"candidate_fraction": 0.6},
    {"gate_bits": 8},
    {"gate_bits": 4, "ffn_ratio": 0.6},
    {"layout": "permute"},
    {"fill": "mean"},
    {"fill": "mean", "candidate_fraction": 0.6},
]


def build(name):
    return tiny.dense(name) if name in DENSE else tiny.moe(name)


def quantised(rows, bits):
    if bits == 16:
        return rows
    group = 32
    return dequantise(*quantise(rows, bits, group), bits, group)


def gate_ffn(x, parts, regions, budget, config, rms, mean):
    """One token by loops: gate, up rows and biases, down, activation."""
    gate, gate_bias, up, up_bias, down, down_bias, combine = parts
    g = quantised(gate, config.gate_bits) @ x + (0 if gate_bias is None else gate_bias)
    u = up @ x + (0 if up_bias is None else up_bias)
    weight = combine(g, rms).abs() * down.norm(dim=0)
    read = sorted(set(regions))
    best = sorted(read, key=lambda i: (-weight[i].item(), i))[:budget]
    h = mean.clone() if config.fill == "mean" else torch.zeros_like(g)
    h[best] = combine(g, u)[best]
    y = down @ h
    return (y if down_bias is None else y + down_bias), best


def dense_parts(mlp):
    gate, up, down, act = independent.weights(mlp)
    bias = getattr(getattr(mlp, "gate_proj", None), "bias", None)
    up_bias = getattr(getattr(mlp, "up_proj", None), "bias", None)
    return gate, bias, up, up_bias, down, mlp.down_proj.bias, lambda g, u: act(g) * u


def expert_parts(module, e):
    w = module.gate_up_proj[e]
    w = w.T if module.is_transposed else w
    bias = module.gate_up_proj_bias[e] if module.has_bias else None
    if module.is_concatenated:
        (gate, up), split = w.chunk(2), lambda b: b.chunk(2)
    else:
        (gate, up), split = (w[0::2], w[1::2]), lambda b: (b[0::2], b[1::2])
    gate_bias, up_bias = split(bias) if bias is not None else (None, None)

    def combine(g, u):
        joint = torch.cat([g, u]) if module.is_concatenated else torch.stack([g, u], -1).flatten()
        return module._apply_gate(joint)

    down_bias = module.down_proj_bias[e] if module.has_bias else None
    return gate, gate_bias, up, up_bias, independent_experts.expert_down(module, e), down_bias, combine


def statistics(x, parts):
    """rms of the up projection and mean of h over prompt tokens x."""
    gate, gate_bias, up, up_bias, *_, combine = parts
    u = x @ up.T + (0 if up_bias is None else up_bias)
    g = x @ gate.T + (0 if gate_bias is None else gate_bias)
    h = torch.stack([combine(a, b) for a, b in zip(g, u)])
    return u.square().mean(0).sqrt(), h.mean(0)


@contextmanager
def reference(model, prompt, state):
    """The model with every FFN run by loops, as partitioned by ``state``; yields the channels chosen per site."""
    chosen = {}
    decoder = model.model
    experts = independent_experts.experts_of(model)
    inputs = {}

    def keep(key):
        return lambda module, args: inputs.setdefault(key, tuple(a.detach().clone() for a in args))

    modules = dict(model.named_modules())
    with independent.pre_hooks((modules[name], keep(name)) for name in state.layers), torch.no_grad():
        model(prompt)

    def make(name, p):
        module = modules[name]
        regions = torch.cat([p.retained, p.candidate], -1).tolist()
        if name not in experts:
            parts = dense_parts(module)
            rms, mean = statistics(inputs[name][0].flatten(0, -2), parts)

            def forward(x):
                y, best = gate_ffn(x.flatten(), parts, regions, p.budget, state.config, rms, mean)
                chosen.setdefault(name, []).append(best)
                return y.view(x.shape)

            return forward
        prompt_x, prompt_index, _ = inputs[name]

        def forward(x, index, weight):
            out = torch.zeros_like(x)
            for k in range(index.shape[1]):
                e = int(index[0, k])
                parts = expert_parts(module, e)
                tokens = prompt_x[(prompt_index == e).any(1)]
                if not len(tokens):  # by the prior, tested elsewhere
                    raise LookupError
                rms, mean = statistics(tokens, parts)
                y, best = gate_ffn(x[0], parts, regions[e], p.budget, state.config, rms, mean)
                chosen.setdefault(name, []).append((e, best))
                out[0] += weight[0, k] * y
            return out

        return forward

    former = {name: modules[name].__dict__.get("forward") for name in state.layers}
    partitions = dict(state.layers)
    popmm.detach(model)
    for name, p in partitions.items():
        modules[name].forward = make(name, p)
    try:
        yield chosen
    finally:
        for name in former:
            del modules[name].forward
    assert decoder is model.model


@pytest.mark.parametrize("name", [*DENSE, *MOE])
@pytest.mark.parametrize("changes", SETTINGS, ids=str)
@torch.no_grad()
def test_decode_equals_loops(name, changes):
    model = build(name)
    prompt, continuation = tiny.prompt(60, seed=2), tiny.prompt(3, seed=1)[0]
    config = CONFIG.replace(**changes)

    def run(cache):
        return torch.cat([model(t.view(1, 1), past_key_values=cache).logits[0] for t in continuation])

    state = popmm.attach(model, config)
    cache = model(prompt).past_key_values
    with state.trace() as trace:
        found = run(cache)
    cache = model(prompt).past_key_values
    with state.simulated_decode():
        at_once = model(continuation[None], past_key_values=cache).logits[0]
    torch.testing.assert_close(at_once, found, atol=1e-4, rtol=1e-3)
    with reference(model, prompt, state) as chosen:
        cache = None
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        forwards = {n: m.__dict__.pop("forward") for n, m in model.named_modules() if n in chosen or n in trace}
        model(prompt, past_key_values=cache)
        for n, m in model.named_modules():
            if n in forwards:
                m.forward = forwards[n]
        try:
            expected = run(cache)
        except LookupError:
            pytest.skip("a token went to an expert that the prompt did not reach")
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    for site, steps in chosen.items():
        if isinstance(steps[0], tuple):
            pairs = trace[site].nonzero()[:, 2:].unique(dim=0)
            assert {tuple(p) for p in pairs.tolist()} == {(e, i) for e, best in steps for i in best}
        else:
            assert [row.nonzero().flatten().tolist() for row in trace[site][:, 0]] == [sorted(best) for best in steps]


@pytest.mark.parametrize("share, cost", [*itertools.product([0.9, 0.7, 0.5, 0.35, 0.1], [1.0, 0.516, 0.266])])
def test_sizes_keep_to_the_bytes(share, cost):
    if share == 0.1 and cost == 0.516:
        with pytest.raises(ValueError, match="reads 100% of the gate rows, 17% of the FFN's bytes, before any channel"):
            gate_sizes(3000, 1 - share, None, cost)
        return
    s = gate_sizes(3000, 1 - share, None, cost)
    read = (cost * s.candidate + 2 * s.budget) / 9000
    assert s.retained == 0 and 1 <= s.budget <= s.candidate <= 3000
    assert read == pytest.approx(min(share, (2 + cost) / 3), abs=1e-3)


def test_bytes_per_token_is_what_is_read():
    model = build("llama")
    with popmm.pruned(model, CONFIG) as state:
        pruned, dense = state.bytes_per_token()
        s = state._ffns[0].sizes
        assert pruned == 2 * (s.candidate + 2 * s.budget) * 32 * 4
        assert pruned / dense == pytest.approx(0.5, abs=0.01)
    with popmm.pruned(model, CONFIG.replace(gate_bits=4)) as state:
        s = state._ffns[0].sizes
        assert state.bytes_per_token()[0] == 2 * (80 * (32 / 2 + 2) + 2 * s.budget * 32 * 4)


def test_a_ratio_alone_asks_for_gate_and_gamma_alone_for_the_papers_mask():
    assert popmm.PopConfig(pruning_ratio=0.3).selection == popmm.PopConfig(fill="mean").selection == "gate"
    assert popmm.PopConfig(candidate_fraction=0.1).selection == "mask"
    assert popmm.PopConfig.paper() == popmm.PopConfig(selection="mask", prefill="pruned")


@pytest.mark.parametrize("ratio, bits", [(0.15, 8), (0.3, 8), (0.4, 4), (0.5, 4)])
def test_bits_follow_from_the_bytes_unless_given(ratio, bits):
    model = build("llama").bfloat16()
    with popmm.pruned(model, ffn_ratio=ratio) as state:
        assert state._ffns[0].layout.bits == bits and state.config.gate_bits is None
        pruned, dense = state.bytes_per_token()
        assert pruned / dense == pytest.approx(1 - ratio, abs=0.02)
        model.generate(tiny.prompt(9), max_new_tokens=3, do_sample=False)
        assert f"gate_bits={bits}" in state.summary()
    with popmm.pruned(model, ffn_ratio=ratio, gate_bits=16) as state:
        assert state._ffns[0].layout.bits == 16


def test_gate_rows_stay_as_they_are_where_they_cannot_be_quantised():
    model = tiny.dense("llama", hidden_size=24, num_attention_heads=2, num_key_value_heads=2)
    with popmm.pruned(model, ffn_ratio=0.4) as state:
        assert {ffn.layout.bits for ffn in state._ffns} == {16}


def test_gate_weights_that_are_no_numbers_are_refused():
    model = build("llama")
    with popmm.pruned(model, ffn_ratio=0.4):  # attach's probe would refuse them by itself
        model(tiny.prompt(9))
        with torch.no_grad():
            model.model.layers[1].mlp.gate_proj.weight[3, 2] = float("nan")
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp holds gate weights that are no finite numbers"):
            model(tiny.prompt(9))


@pytest.mark.parametrize("bits", [16, 8])
def test_gradients_flow_through_a_decode_step(bits):
    model = build("llama")
    with popmm.pruned(model, CONFIG.replace(gate_bits=bits)) as state:
        found = []
        for around in (nullcontext, state.simulated_decode):
            cache = model(tiny.prompt(9)).past_key_values
            x = model.get_input_embeddings()(tiny.prompt(1, seed=3)).detach().requires_grad_()
            with around():
                model(inputs_embeds=x, past_key_values=cache).logits.sum().backward()
            found.append(x.grad)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


def test_larger_batches_read_all_of_u_and_say_so():
    model = build("llama")
    ids = tiny.prompt(9, batch=6)
    with popmm.pruned(model, CONFIG) as state:
        with state.trace() as trace:
            model.generate(ids, max_new_tokens=3, do_sample=False)
        s = state._ffns[0].sizes
        assert (trace["model.layers.0.mlp"].sum(-1) == s.read).all()
        model.generate(ids[:1], max_new_tokens=3, do_sample=False)
        with state.trace() as trace:
            model.generate(ids[:1], max_new_tokens=3, do_sample=False)
        assert (trace["model.layers.0.mlp"].sum(-1) == s.budget).all()
        assert f"batches above {s.read // s.budget} read" in state.summary()


def test_compiled_steps_serve_all_prompts():
    from torch._dynamo.utils import counters

    compile_config = compiled_anywhere(fullgraph=True, backend="aot_eager")
    how = dict(cache_implementation="static", max_length=40, do_sample=False)
    prompts = [tiny.prompt(n, seed=n) for n in range(5, 15)]
    for name, bits in (("llama", 16), ("llama", 4), ("mixtral", 16)):
        model = build(name)
        torch._dynamo.reset()
        with popmm.pruned(model, CONFIG.replace(gate_bits=bits)):
            graphs = []
            for ids in prompts:
                eager = model.generate(ids, **how)
                assert torch.equal(model.generate(ids, **how, compile_config=compile_config), eager)
                graphs.append(counters["stats"]["unique_graphs"])
        assert graphs == [graphs[0]] * len(prompts), name


@pytest.mark.parametrize("settings", [{"modality_balance": 0.5}, {"vision": "prune"}])
def test_a_failed_attach_leaves_down_as_it_was_stored(settings):
    model = build("llama")
    strides = [p.stride() for p in model.parameters()]
    with pytest.raises(ValueError):
        popmm.attach(model, CONFIG.replace(layout="permute", **settings))
    assert [p.stride() for p in model.parameters()] == strides


def test_quantised_rows_follow_the_weights():
    model, ids = build("llama"), tiny.prompt(9)
    with popmm.pruned(model, CONFIG.replace(gate_bits=8)), torch.no_grad():
        model.generate(ids, max_new_tokens=2)
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.mul_(-1)
        found = model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with popmm.pruned(model, CONFIG.replace(gate_bits=8)):
        fresh = model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert all(map(torch.equal, found.logits, fresh.logits))


def test_widths_that_cannot_be_quantised_are_named():
    model = tiny.dense("llama", hidden_size=36, num_attention_heads=3, num_key_value_heads=3, head_dim=12)
    with pytest.raises(ValueError, match="gate_bits=4 quantises groups of 16 weights or more, and model"):
        popmm.attach(model, CONFIG.replace(gate_bits=4))


def test_a_down_projection_that_is_a_part_of_a_parameter_is_copied_and_not_turned():
    whole = torch.nn.Parameter(torch.randn(4, 32, 48))
    gate, up = torch.randn(2, 3, 48, 32)
    before = whole.detach().clone()
    layout = GateLayout(gate_sizes(48, 0.4, None), fill_mean=False, bits=16, in_place=True, site="experts")
    layout.allocate(FFNWeights(gate, up, whole[:3]))
    assert torch.equal(whole, before) and whole.is_contiguous()
    layout.release()

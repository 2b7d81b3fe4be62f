"""Tiers on whole models: against loops over decoded rows, with every way to run a step."""

import dataclasses

import pytest
import tiny
import torch
from popmm.adapters import describe

import popmm
from popmm import kernels
from popmm.compat import compiled_anywhere
from popmm.kernels import planes

CONFIG = popmm.PopConfig(bytes=0.28)


def build(name):
    return tiny.moe(name) if name in tiny.MOE else tiny.dense(name)


def by_hand(site, x, rms, tiers, expert=None):
    """One token through one FFN by loops over its channels; (output, {channel: bits})."""
    w = site.weights()
    own = [t if expert is None or t is None else t[expert] for t in w]
    gate, up, down = (planes.encode(t.float().contiguous()) for t in (own[0], own[1], own[2].mT))
    rows = {(part, b): planes.decode(p, b) for part, p in (("g", gate), ("u", up), ("d", down)) for b in (4, 6, 8)}
    gate_bias, up_bias, down_bias = (torch.zeros(1) if b is None else b for b in own[3:])
    g4 = rows["g", 4] @ x + gate_bias
    weight = site.combine(g4, rms).abs() * own[2].float().norm(dim=0)
    order = sorted(range(len(weight)), key=lambda i: (-weight[i].item(), i))
    y, read, start = torch.zeros_like(x), {}, 0
    for bits, n in tiers:
        for i in order[start : start + n]:
            g = rows["g", bits][i] @ x + (gate_bias[i] if gate_bias.numel() > 1 else 0)
            u = rows["u", bits][i] @ x + (up_bias[i] if up_bias.numel() > 1 else 0)
            y += site.combine(g[None], u[None])[0] * rows["d", bits][i]
            read[i] = bits
        start += n
    return y + down_bias, read


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama-bias", "phi3", "gemma3", "mixtral", "gpt-oss", "deepseek-v3"])
@torch.no_grad()
def test_a_step_is_what_loops_over_channels_give(name, native, monkeypatch):
    if not native:
        monkeypatch.setattr("popmm.kernels.native.serves_planes", lambda rows: False)  # and so no whole FFNs
    model = build(name)
    site = next(s for layer in describe(model).layers for s in layer.sites if not s.shared)
    with popmm.pruned(model, CONFIG) as state:
        model.generate(tiny.prompt(40), max_new_tokens=2, do_sample=False)
        ffn = next(f for f in state._ffns if f.name == site.name)
        layout, x = ffn.layout, torch.randint(-127, 128, (3, 32)) / 50.0  # as 8 bits tell it
        x[:, 0] = 127 / 50
        experts = torch.tensor([1, 0, 3]) if site.is_experts else None
        y, index = layout.decode(x, site.combine, experts)
        at_once, passing = layout.decode_all(x, site.combine, site.weights(), None, experts)
        for t in range(3):
            e = None if experts is None else int(experts[t])
            rms = layout.rms if e is None else layout.rms[e]
            expected, read = by_hand(site, x[t], rms, ffn.sizes.tiers, e)
            assert set(index[t].tolist()) == set(read)
            assert set(passing[t].nonzero().flatten().tolist()) == set(read)
            torch.testing.assert_close(at_once[t], expected, atol=1e-5, rtol=1e-4)
            # the C kernels round the factors of down rows to 8 bits
            assert (y[t] - expected).norm() <= (0.02 if native else 1e-5) * expected.norm()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_more_bits_are_nearer_to_the_dense_model(name):
    model = build(name)
    how = dict(max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True)
    dense = model.generate(tiny.prompt(20), **how).logits[-1]
    errors = []
    for settings in (dict(weight_bits=8), dict(weight_bits=6), dict(weight_bits=4), dict(bytes=0.2)):
        with popmm.pruned(model, selection="tiers", **settings):
            errors.append((model.generate(tiny.prompt(20), **how).logits[-1] - dense).norm())
    assert errors == sorted(errors) and errors[0] < 0.05 * dense.norm()


def test_bytes_are_told_of_16_bit_weights():
    model = tiny.build(tiny.DENSE["llama"], torch.bfloat16)
    with popmm.pruned(model, CONFIG) as state:
        read, dense = state.bytes_per_token()
        sizes = state._ffns[0].sizes
        by_tier = sum(n * (b - 4 + 2 * (b + 0.5)) for b, n in sizes.tiers)  # d_model 32: groups of 32
        assert read == 2 * round((80 * 4.5 + by_tier) * 32 / 8) and dense == 2 * 3 * 80 * 32 * 2
        assert read / dense == pytest.approx(0.28, abs=0.01)
        assert "in 4 bits, of each FFN's channels" in state.summary()
        assert state.buffer_bytes() > 3 * 80 * 32 * 8.5 / 8 * 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "gpt-oss"])
def test_compiled_steps_give_the_eager_tokens(name):
    model, compiled = build(name), compiled_anywhere(fullgraph=True)
    torch._dynamo.reset()
    with popmm.pruned(model, CONFIG):
        for n in (6, 9):
            how = dict(max_new_tokens=5, do_sample=False, cache_implementation="static")
            eager = model.generate(tiny.prompt(n), **how)
            assert torch.equal(model.generate(tiny.prompt(n), **how, compile_config=compiled), eager)


def test_gradients_flow_through_a_step(llama):
    with popmm.pruned(llama, CONFIG):
        with torch.no_grad():
            cache = llama(tiny.prompt(9)).past_key_values
        x = llama.get_input_embeddings()(tiny.prompt(1)).detach().requires_grad_()
        llama(inputs_embeds=x, past_key_values=cache).logits.sum().backward()
    assert x.grad.abs().sum() > 0


def test_gradients_flow_through_the_channels_that_are_read(llama):
    with popmm.pruned(llama, CONFIG) as state, torch.no_grad():
        llama(tiny.prompt(9))
        ffn = state._ffns[0]
        x = torch.randn(2, ffn.site.weights().d_model)
        with torch.enable_grad():
            x.requires_grad_()
            ffn.layout.decode(x, ffn.layout.combine)[0].square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_the_prompts_statistics_predict_the_choice(llama):
    """The up projection's root mean square over the prompt, of each prompt anew."""
    seen = {}
    for i, layer in enumerate(llama.model.layers):
        layer.mlp.up_proj.register_forward_hook(lambda _, inputs, out, i=i: seen.__setitem__(i, out.detach()))
    with popmm.pruned(llama, CONFIG) as state, torch.no_grad():
        for n in (9, 14):
            llama(tiny.prompt(n, seed=n))
            for i, ffn in enumerate(state._ffns):
                expected = seen[i][0].square().mean(0).sqrt()
                torch.testing.assert_close(ffn.layout.rms, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(bytes=1.5), "bytes=1.5: give a share"),
        (dict(bytes=0.3, ffn_ratio=0.4), "bytes=0.3 says what a token reads"),
        (dict(bytes=0.3, selection="mask"), "belongs to selection='tiers' or 'gate'"),
        (dict(selection="tiers", fill="mean"), "fill='mean' does not go with selection='tiers'"),
        (dict(selection="tiers", candidate_fraction=0.2), "candidate_fraction=0.2 does not go"),
        (dict(selection="tiers", weight_bits=9), "weight_bits=9: give 8, 7, 6, 5, 4 or 3"),
        (dict(weight_bits=8, selection="gate"), "weight_bits=8 belongs to selection='tiers'"),
        (dict(weight_bits=8.0), "weight_bits=8.0: give 8, 7"),
        (dict(bytes=0.3, rest_bits=8.0), "rest_bits=8.0: give 16"),
        (dict(bytes=0.3, candidate_fraction=0.1), "candidate_fraction=0.1 does not go with selection='tiers'"),
        (dict(bytes=1, weight_bits=4), "weight_bits=4 reads all channels alike"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        popmm.PopConfig(**settings)


def test_bytes_ask_for_tiers_and_are_replaced_by_ratios():
    assert CONFIG.selection == "tiers" and CONFIG.ffn_ratio == pytest.approx(0.72)
    assert CONFIG.replace(pruning_ratio=0.2).bytes is None and CONFIG.replace(bytes=0.3).ffn_ratio == pytest.approx(0.7)
    assert popmm.PopConfig(ffn_ratio=0.2).replace(bytes=0.3).ffn_ratio == pytest.approx(0.7)
    assert CONFIG.replace(vision="prune").bytes == 0.28


def test_widths_that_cannot_be_grouped_are_named():
    model = tiny.build(tiny.LlamaConfig(**{**tiny.COMMON, "hidden_size": 40}))
    with pytest.raises(ValueError, match="selection='tiers' quantises groups of 16 weights.*d_model=40"):
        popmm.attach(model, CONFIG)


def test_too_few_bytes_are_named(llama):
    with pytest.raises(ValueError, match="give bytes=0.09 or more"):
        popmm.attach(llama, bytes=0.06)
    assert "forward" not in llama.model.layers[0].mlp.__dict__


@pytest.mark.skipif(kernels.build.library() is None, reason="no C compiler")
def test_batches_choose_together(llama):
    ids = tiny.prompt(9, batch=3)
    with popmm.pruned(llama, CONFIG) as state, state.trace() as trace:
        llama.generate(ids, max_new_tokens=3, do_sample=False)
        mask = trace["model.layers.0.mlp"]
    assert (mask.sum(-1) == state._ffns[0].sizes_of(3).budget).all() and (mask == mask[:, :1]).all()


def test_tiers_are_the_default_and_give_way_to_whatever_is_asked_for():
    default = popmm.PopConfig()
    assert (default.selection, default.bytes, default.pruning_ratio) == ("tiers", 0.33, None)
    assert popmm.PopConfig(rest_bits=8, skip_layers=(0,)).bytes == 0.33
    assert popmm.PopConfig(weight_bits=8).selection == "tiers"
    changed = default.replace(ffn_ratio=0.3)
    assert (changed.selection, changed.bytes, changed.ffn_ratio) == ("gate", None, 0.3)
    assert default.replace(selection="mask").pruning_ratio == 0.4
    assert default.replace(rest_bits=8) == popmm.PopConfig(rest_bits=8)
    assert popmm.PopConfig(bytes=0.33).replace(selection="gate").selection == "gate"


def test_the_default_serves_models_that_no_group_divides():
    model = tiny.dense("llama", hidden_size=40, num_attention_heads=4, head_dim=8)
    with popmm.pruned(model) as state:
        assert state.config.selection == "gate" and state.config.pruning_ratio == 0.4


def test_the_default_can_be_taken_apart_and_put_together():
    default = popmm.PopConfig()
    assert popmm.PopConfig(**dataclasses.asdict(default)) == default
    assert dataclasses.replace(default, skip_layers=(1,)) == default.replace(skip_layers=(1,))
    replacing = popmm.PopConfig(weights="replace")
    assert replacing.replace(selection="gate").weights == "keep"
    assert replacing.replace(bytes=0.25).weights == "replace" and replacing.replace(bytes=0.25).bytes == 0.25


def test_what_is_no_number_stays_none():
    model = tiny.dense("llama")
    with popmm.pruned(model, bytes=0.3, rest_bits=8), torch.no_grad():
        cache = model(tiny.prompt(9)).past_key_values
        model.model.embed_tokens.weight.data[5] = torch.nan
        assert model(torch.tensor([[5]]), past_key_values=cache).logits.isnan().all()


def test_double_precision_is_served(llama):
    model = llama.double()
    with popmm.pruned(model, bytes=0.3, rest_bits=8) as state:
        model.generate(tiny.prompt(9), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert state.passes["decode"] == 3

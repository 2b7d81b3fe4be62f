"""What the adapters find, and how they refuse what they do not know."""

import pytest
import tiny
import torch
from popmm.adapters import describe
from torch import nn
from transformers import BertConfig, BertModel

import popmm
from popmm import zoo


def test_attention_with_a_fused_projection_is_no_ffn():
    description = describe(tiny.dense("phi3"))
    assert [site.name for site in description.sites()] == ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.mark.parametrize("activation", [nn.functional.silu, nn.functional.gelu])
def test_activation_called_inline_is_found_by_the_probe(llama, activation):
    class Inline(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.w1, self.w3, self.w2 = mlp.gate_proj, mlp.up_proj, mlp.down_proj

        def forward(self, x):
            return self.w2(activation(self.w1(x)) * self.w3(x))

    for layer in llama.model.layers:
        layer.mlp = Inline(layer.mlp)
    ids, token = tiny.prompt(9), tiny.prompt(1, seed=1)
    with popmm.pruned(llama, ffn_ratio=0.4, candidate_fraction=0) as state, torch.no_grad():
        cache = llama(ids).past_key_values
        x = torch.randn(1, 1, 32)
        llama(token, past_key_values=cache)
        mlp = llama.model.layers[0].mlp
        on = torch.zeros(80)
        on[state.layers["model.layers.0.mlp"].retained] = 1
        expected = mlp.w2(activation(mlp.w1(x)) * mlp.w3(x) * on)
        torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=1e-4)


def test_an_ffn_shared_by_two_layers_is_one_ffn(llama):
    llama.model.layers[1].mlp = llama.model.layers[0].mlp
    with popmm.pruned(llama, ffn_ratio=0.4, selection="mask") as state, state.trace() as trace:
        llama.generate(tiny.prompt(9), max_new_tokens=4, do_sample=False)
        assert state.ready and list(state.layers) == ["model.layers.0.mlp"]
        assert (trace["model.layers.0.mlp"].sum(-1) == 48).all()


def test_encoder_without_gates_is_named():
    config = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    with pytest.raises(
        popmm.UnsupportedModelError, match=r"encoder\.layer\.0 \(BertLayer\) holds no FFN of a known form"
    ):
        popmm.attach(BertModel(config).eval())


def test_stacked_experts_off_the_interface_are_named(llama):
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.zeros(2, 4, 4))
            self.down = nn.Parameter(torch.zeros(2, 4, 4))

    llama.model.layers[1].experts = Foreign()
    with pytest.raises(
        popmm.UnsupportedModelError, match=r"layers\.1\.experts \(Foreign\) holds stacked experts \(gate_up, down\)"
    ):
        popmm.attach(llama)


def test_bare_decoder_keeps_its_statistics_with_either_output_form(llama):
    decoder = llama.model
    first, second, token = tiny.prompt(9, seed=1), tiny.prompt(7, seed=2), tiny.prompt(1, seed=3)
    with popmm.pruned(decoder, ffn_ratio=0.4), torch.no_grad():
        alone = decoder(token, past_key_values=decoder(first).past_key_values)[0]
        cache = decoder(first, return_dict=False)[1]
        decoder(second, return_dict=False)
        assert torch.equal(decoder(token, past_key_values=cache)[0], alone)


@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_float64_models_work(ratio):
    model = tiny.build(tiny.DENSE["llama"], dtype=torch.float64)
    with popmm.pruned(model, pruning_ratio=ratio) as state:
        model.generate(tiny.prompt(9), max_new_tokens=3)
        assert state.layers["model.layers.0.mlp"].importance.dtype == torch.float32


def test_weights_loaded_while_attached_are_ranked_by_their_own_norms(llama):
    other = tiny.build(tiny.DENSE["llama"], seed=3)
    ids = tiny.prompt(9)
    with popmm.pruned(other, ffn_ratio=0.4) as state:
        other.generate(ids, max_new_tokens=1)
        expected = state.layers["model.layers.0.mlp"].importance
    with popmm.pruned(llama, ffn_ratio=0.4) as state:
        llama.generate(ids, max_new_tokens=1)
        llama.load_state_dict(other.state_dict())
        llama.generate(ids, max_new_tokens=1)
        assert torch.equal(state.layers["model.layers.0.mlp"].importance, expected)


def test_a_model_moved_to_another_dtype_while_attached_goes_on(llama):
    with popmm.pruned(llama, ffn_ratio=0.4):
        llama.generate(tiny.prompt(9), max_new_tokens=2)
        llama.to(torch.bfloat16)
        llama.generate(tiny.prompt(9), max_new_tokens=2)


@pytest.mark.parametrize("build", [lambda: tiny.dense("llama"), lambda: tiny.moe("mixtral")])
def test_attach_under_another_default_device(build):
    model = build()
    with torch.device("meta"):
        popmm.attach(model, ffn_ratio=0.4)
    popmm.detach(model)


def test_third_parties_are_asked_first(monkeypatch, llama):
    from popmm.adapters import base, register

    asked = []

    class Adapter:
        def site(self, module, probe):
            asked.append(type(module).__name__)

    monkeypatch.setattr(base, "_REGISTRY", list(base._REGISTRY))
    register(Adapter())
    with popmm.pruned(llama, ffn_ratio=0.4) as state:
        assert len(state._ffns) == 2
    assert "LlamaMLP" in asked


def test_bundled_models_are_described_without_a_probe():
    model, _ = zoo.load("stories-moe")
    sites = list(describe(model, probe=False).sites())
    assert [(site.n_experts, site.top_k) for site in sites] == [(8, 2)] * 4

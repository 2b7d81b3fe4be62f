"""What is found in models whose FFNs are not all of one plain form, and how those without any are refused."""

import pytest
import tiny
import tiny_families
import torch
from popmm.adapters import describe
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GitConfig,
    GitForCausalLM,
    ModernBertConfig,
    ViTConfig,
    ViTModel,
)

import popmm
from popmm.config import PopConfig
from popmm.method.ffn import ffn


def build(name, **changes):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    return tiny_families.build(name, **changes)


def found(name, **changes):
    """Names of a family's sites, which must be the same with and without weights, and its left-out FFNs."""
    model = build(name, **changes)
    described = [describe(model, probe=probe) for probe in (True, False)]
    sites, again = ([site.name for site in description.sites()] for description in described)
    assert sites == again and described[0].left_out.keys() == described[1].left_out.keys()
    return sites, described[0].left_out


SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)


def test_layers_of_two_stacks_are_all_found():
    sites, left_out = found("hrm_text")
    stacks = [f"model.{stack}.layers.{i}.mlp" for stack in ("L_module", "H_module") for i in (0, 1)]
    assert sites == stacks and not left_out


def test_layers_of_two_stacks_are_numbered_through():
    description = describe(build("hrm_text"))
    assert [layer.index for layer in description.layers] == [0, 1, 2, 3]
    assert [site.layer for site in description.sites()] == [0, 1, 2, 3]


def test_an_activation_of_another_form_is_taken_from_the_module_itself():
    sites, left_out = found("minimax_m3_vl_text")
    assert not left_out
    assert sites == ["model.layers.0.mlp", "model.layers.1.mlp.experts", "model.layers.1.mlp.shared_experts"]


@pytest.mark.parametrize("name", ["minimax_m3_vl_text", "inkling_text", "gemma3n_text", "recurrent_gemma", "hrm_text"])
def test_a_sites_description_computes_what_the_module_does(name):
    model = build(name)
    torch.manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if parameter.numel() == 1 and parameter_name.endswith("scale"):
            parameter.data.fill_(0.7)
    for site in describe(model).sites():
        if not site.is_experts:
            x = torch.randn(1, 5, 32) * torch.tensor([0.1, 1.0, 10.0, 30.0, 100.0])[:, None]
            with torch.no_grad():
                expected, got = site.module(x), ffn(x, site.weights(), site.combine)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_shared_experts_in_one_tensor_are_one_site_that_every_token_goes_through():
    sites, left_out = found("inkling_text")
    assert sites == ["model.layers.0.mlp", "model.layers.1.mlp.experts", "model.layers.1.mlp.shared_experts"]
    assert not left_out
    routed, shared = list(describe(build("inkling_text")).sites())[1:]
    assert routed.is_routed and not routed.shared and routed.top_k == 2 < routed.n_experts
    assert shared.shared and not shared.is_routed and shared.top_k == shared.n_experts == 2


def test_activation_sparse_layers_stay_dense_and_the_others_are_sites():
    sites, left_out = found("gemma3n_text")
    assert sites == ["model.layers.1.mlp"]
    assert list(left_out) == ["model.layers.0.mlp"]
    assert "Gemma3nTextMLP computes a channel from other channels too" in left_out["model.layers.0.mlp"]


def test_recurrent_gates_are_no_experts():
    sites, left_out = found("recurrent_gemma")
    assert sites == ["model.layers.0.mlp_block", "model.layers.1.mlp_block"] and not left_out


def test_experts_off_the_interface_that_cannot_be_pruned_stay_dense_beside_their_shared_expert():
    sites, left_out = found("llama4_text")
    parts = ("experts", "shared_expert")
    assert sites == [f"model.layers.{i}.feed_forward.{part}" for i in (0, 1) for part in parts] and not left_out
    model = build("llama4_text", num_experts_per_tok=2)
    described = describe(model)
    assert [site.name for site in described.sites()] == [sites[1], sites[3]]
    reason = "is given all tokens for each expert, and 2 experts count for each token"
    assert set(described.left_out) == {sites[0], sites[2]} and reason in described.left_out[sites[0]]
    with pytest.raises(ValueError, match=r"only shared experts can be pruned.*give shared_experts='prune'"):
        popmm.budget.ffn_ratio(model, 0.1)
    assert 0.1 < popmm.budget.ffn_ratio(model, 0.1, shared_experts="prune") < 0.95


def test_two_ffns_of_one_layer_and_its_experts_are_found():
    sites, left_out = found("longcat_flash")
    ffns = [f"model.layers.0.mlps.{i}" for i in (0, 1)]
    assert set(sites) == {*ffns, "model.layers.0.mlp.experts"} and not left_out


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "zamba2",
            r"feed_forward \(Zamba2MLP\) has the layers of an FFN and others beside them \(gate_up_proj_ad",
        ),
        ("bitnet", r"\(BitNetMLP\) divides its channels by a norm over all of them before its down projection"),
        ("mamba", r"MambaForCausalLM has no FFNs: its layers hold nothing but mixers.*mixer \(MambaMixer\)"),
        (
            "rwkv",
            r"RwkvFeedForward\) is an FFN of another form \(key and value widen and narrow, receptance gates no ch",
        ),
    ],
)
def test_models_without_an_ffn_of_a_known_form_are_refused_with_the_true_reason(name, message):
    model = build(name)
    for probe in (True, False):
        with pytest.raises(popmm.UnsupportedModelError, match=message) as refusal:
            describe(model, probe=probe)
        assert "attention" not in str(refusal.value).lower()


def test_an_encoder_is_told_as_one():
    config = BertConfig(vocab_size=64, **SMALL)
    for kind in (BertModel, BertLMHeadModel):
        with pytest.raises(popmm.UnsupportedModelError, match=rf"{kind.__name__} is an encoder \(is_decoder=False"):
            describe(kind(config).eval())


def test_an_encoder_with_gated_ffns_is_told_as_one():
    model = AutoModel.from_config(ModernBertConfig(vocab_size=64, pad_token_id=0, **SMALL)).eval()
    with pytest.raises(popmm.UnsupportedModelError, match=r"ModernBertModel is an encoder: .* takes no cache"):
        describe(model)


def test_ffns_in_two_parts_of_a_decoders_layers_are_found():
    config = BertConfig(vocab_size=64, is_decoder=True, **SMALL)
    vision = dict(SMALL, image_size=28, patch_size=14)
    git = GitForCausalLM(GitConfig(vocab_size=64, vision_config=vision, **SMALL))
    for model, name in ((BertLMHeadModel(config), "bert.encoder.layer.0"), (git, "git.encoder.layer.0")):
        for probe in (True, False):
            description = describe(model.eval(), probe=probe)
            (site,) = description.sites()
            assert site.name == name and not description.left_out
            assert description.layers[0].attention_weights == 4 * 32 * 32


@pytest.mark.parametrize(
    "name, sites",
    [
        ("gpt2", [f"transformer.h.{i}.mlp" for i in range(3)]),
        ("opt", ["model.decoder.layers.0"]),
        ("falcon", ["transformer.h.0.mlp"]),
        ("phi", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("gpt_neox", ["gpt_neox.layers.0.mlp"]),
        ("starcoder2", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("nanochat", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("nemotron_h", ["model.layers.0.mixer.experts", "model.layers.0.mixer.shared_experts"]),
    ],
)
def test_ffns_without_a_gate_are_found(name, sites):
    assert found(name) == (sites, {})


def test_models_of_pictures_are_told_as_such():
    vision = dict(SMALL, image_size=28, patch_size=14)
    with pytest.raises(popmm.UnsupportedModelError, match=r"ViTModel reads pixel_values: its ViTModel takes no cache"):
        describe(ViTModel(ViTConfig(**vision)).eval())
    clip = CLIPModel(CLIPConfig(text_config=dict(SMALL, vocab_size=64), vision_config=vision)).eval()
    with pytest.raises(popmm.UnsupportedModelError, match=r"CLIPModel is an encoder: .* takes no cache"):
        describe(clip)


def test_left_out_ffns_count_among_the_weights_that_stay():
    model = build("gemma3n_text")
    description = describe(model)
    layers = model.model.layers
    per_ffn = 3 * 32 * 48
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    every = sum(m.weight.numel() for m in linears)
    expected = 0.1 * every / per_ffn
    assert popmm.budget.ratio_of(description, PopConfig(pruning_ratio=0.1)) == pytest.approx(expected)


def test_a_ratio_out_of_reach_says_how_many_ffns_stay(llama):
    mlp = llama.model.layers[0].mlp
    plain = type(mlp).forward
    mlp.forward = lambda x: plain(mlp, x) * 2
    with pytest.raises(ValueError, match=r"of each FFN \(1 others cannot be pruned\); at most 95%"):
        popmm.budget.ratio_of(describe(llama), PopConfig(pruning_ratio=0.6))


def test_a_skipped_layer_of_unknown_form_counts_as_before():
    model = build("gemma3n_text")
    skipped = popmm.budget.ffn_ratio(model, 0.1, skip_layers=(0,))
    assert skipped == pytest.approx(popmm.budget.ffn_ratio(model, 0.1))
    with pytest.raises(ValueError, match=r"skip_layers=\(1,\) leaves no FFN to prune"):
        popmm.budget.ffn_ratio(model, 0.1, skip_layers=(1,))


def test_tiny_families_are_built_from_their_own_settings():
    assert len(tiny_families.KNOWN) > 10 and tiny.VOCAB == 64


@pytest.mark.slow
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_every_family_of_transformers_is_described_or_refused(auto):
    outcomes = {}
    for config in auto._model_mapping:
        try:
            with torch.device("meta"):
                model = auto.from_config(config()).eval()
        except Exception:  # a family whose defaults do not build says nothing
            continue
        try:
            description = describe(model, probe=False)
            outcomes[config.model_type] = len(list(description.sites()))
        except popmm.UnsupportedModelError:
            outcomes[config.model_type] = 0
    assert len(outcomes) > 50
    assert sum(sites > 0 for sites in outcomes.values()) > 0.5 * len(outcomes)


def test_a_cache_of_a_models_own_is_refused_at_attach():
    model = build("xlstm")
    for probe in (True, False):
        with pytest.raises(popmm.UnsupportedModelError, match="keeps what it has read in xLSTMCache, a form of"):
            describe(model, probe=probe)

"""Adapters of the real PEFT package: on attention, on FFNs, switched, turned off, scaled and trained while attached."""

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from popmm.adapters import describe

import popmm

FFN = ["gate_proj", "up_proj", "down_proj"]
INPUTS = dict(input_ids=tiny.prompt(9), attention_mask=torch.ones(1, 9, dtype=torch.int64))
SELECTIONS = {
    "tiers": dict(selection="tiers", bytes=0.33),
    "8 bits": dict(selection="tiers", weight_bits=8),
    "mask": dict(selection="mask", ffn_ratio=0.4, candidate_fraction=0.2),
    "mask, means": dict(selection="mask", ffn_ratio=0.4, fill="mean", prefill="pruned"),
    "keep": dict(selection="keep", ffn_ratio=0.4, candidate_fraction=0.2),
}
each_selection = pytest.mark.parametrize("settings", SELECTIONS.values(), ids=SELECTIONS)


def adapted(targets, name="llama", seed=1, dtype=torch.float32, **settings):
    """A tiny model with random adapters."""
    model = tiny.build(tiny.DENSE[name]).to(dtype)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **settings))
    return randomised(model, "default", seed)


def randomised(model, adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name and "magnitude" not in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def decoded(model):
    how = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return torch.stack(model.generate(**INPUTS, **how).logits)


def pruned_logits(model, settings):
    with popmm.pruned(model, **settings) as state:
        logits = decoded(model)
        assert dict(state.passes) == dict(prompt=1, decode=5, dense=0)
    return logits


@each_selection
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], FFN, ["up_proj"], "all-linear"], ids=str)
def test_an_adapted_model_decodes_as_the_merged_one(targets, settings):
    model = adapted(targets)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense, found = decoded(model), pruned_logits(model, settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(decoded(model), dense)
    expected = pruned_logits(model.merge_and_unload(), settings)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, dense, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapted(FFN, use_dora=True),
        lambda: adapted(FFN, use_rslora=True),
        lambda: adapted(["gate_up_proj", "down_proj"], name="phi3"),
        lambda: randomised(
            get_peft_model(
                tiny.dense("llama"),
                IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
            ),
            "default",
            1,
        ),
    ],
    ids=["DoRA", "rsLoRA", "fused", "IA3"],
)
def test_other_adapters_decode_as_merged_ones(make):
    model = make()
    found = pruned_logits(model, SELECTIONS["mask"])
    expected = pruned_logits(model.merge_and_unload(), SELECTIONS["mask"])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_bfloat16_models_with_adapters_in_float32_decode_as_merged_ones():
    model = adapted(FFN, dtype=torch.bfloat16)
    assert model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.dtype == torch.float32
    found = pruned_logits(model, SELECTIONS["keep"]).float()
    expected = pruned_logits(model.merge_and_unload(), SELECTIONS["keep"]).float()
    assert (found[0] - expected[0]).norm() < 0.05 * expected[0].norm()


@pytest.mark.parametrize("targets", [FFN, ["q_proj"]], ids=str)
def test_nothing_pruned_is_the_adapted_model_exactly(targets):
    model = adapted(targets)
    dense = decoded(model)
    with popmm.pruned(model, ffn_ratio=0.0, selection="gate"):
        assert torch.equal(decoded(model), dense)


@each_selection
def test_adapters_are_switched_scaled_trained_and_turned_off_between_prompts(settings):
    model = adapted(FFN)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=4, target_modules=FFN))
    randomised(model, "other", 2)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = pruned_logits(model, settings)
    with model.disable_adapter():
        alone["none"] = pruned_logits(model, settings)
    assert not torch.equal(alone["default"], alone["other"])
    with popmm.pruned(model, **settings):
        for name in ("other", "default", "other"):
            model.set_adapter(name)
            torch.testing.assert_close(decoded(model), alone[name])
        with model.disable_adapter():
            torch.testing.assert_close(decoded(model), alone["none"])
        torch.testing.assert_close(decoded(model), alone["other"])
        mlp = model.base_model.model.model.layers[0].mlp
        mlp.up_proj.lora_B["other"].weight.data.mul_(3)
        mlp.down_proj.set_scale("other", 0.25)
        changed = decoded(model)
    torch.testing.assert_close(changed, pruned_logits(model, settings))
    assert not torch.allclose(changed, alone["other"], atol=1e-3)


def test_a_projection_that_is_trained_as_a_whole_decodes_as_its_copy():
    model = adapted(["q_proj"], modules_to_save=["up_proj"])
    found = pruned_logits(model, SELECTIONS["mask"])
    torch.testing.assert_close(found, pruned_logits(model.merge_and_unload(), SELECTIONS["mask"]))


def test_adapters_on_stacked_experts_leave_them_dense_until_they_are_merged():
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    settings = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
    model = randomised(get_peft_model(tiny.moe("mixtral"), settings), "default", 1)
    with pytest.raises(popmm.UnsupportedModelError, match=r"weights of MixtralExperts anew .*merge_and_unload\(\)"):
        describe(model)
    assert len(list(describe(model.merge_and_unload()).sites())) == 2


def test_the_summary_says_that_weights_are_read_through_adapters():
    model = adapted(["up_proj"])
    with popmm.pruned(model, **SELECTIONS["mask"]) as state:
        assert set(state.notes().values()) == {"read through its adapters (lora Linear)"}
    with popmm.pruned(model, **SELECTIONS["tiers"]) as state:
        assert all("read from lora Linear; rounding it again" in note for note in state.notes().values())


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(selection="gate", ffn_ratio=0.4),
            r"\(lora Linear\), and selection='gate' .*merge_and_unload",
        ),
        (
            dict(selection="mask", ffn_ratio=0.4, layout="permute"),
            "layout='permute': .* has adapters; give ",
        ),
        (
            dict(selection="tiers", bytes=0.33, weights="replace"),
            r"no parameters of its own \(adapted or q",
        ),
    ],
)
def test_what_reads_weights_in_place_is_refused_and_leaves_the_model_as_it_was(settings, message):
    model = adapted(FFN)
    dense = decoded(model)
    with pytest.raises(ValueError, match=message):
        popmm.attach(model, **settings)
    assert torch.equal(decoded(model), dense)


def test_adapters_added_while_attached_are_refused_at_the_next_prompt():
    model = adapted(FFN)
    with popmm.pruned(model, **SELECTIONS["mask"]):
        decoded(model)
        model.add_adapter("late", LoraConfig(r=2, target_modules=FFN))
        with pytest.raises(RuntimeError, match=r"layers\.0\.mlp.* was replaced or wrapped while"):
            decoded(model)


def test_an_adapter_that_adds_a_bias_stays_dense_with_the_reason():
    model = adapted(["up_proj"], lora_bias=True)
    with pytest.raises(popmm.UnsupportedModelError, match=r"up_proj is a lora Linear that computes .*merge_and_unload"):
        describe(model)

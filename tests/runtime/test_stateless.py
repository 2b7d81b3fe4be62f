"""statistics="weights": a choice that needs no prompt, and so serves any sequence and any cache."""

import pytest
import tiny
import torch
from matrix import MODELS, generate
from transformers import DynamicCache

import popmm

SETTINGS = {"tiers": dict(bytes=0.3), "gate": dict(ffn_ratio=0.4), "mask": dict(ffn_ratio=0.4, selection="mask")}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_one_partition_serves_every_sequence(name, settings):
    model = MODELS[name].build()
    with torch.no_grad():
        cache = model(tiny.prompt(9)).past_key_values  # of which popmm knows nothing
    with popmm.pruned(model, statistics="weights", **settings) as state, torch.no_grad():
        assert state.ready and not state.notes()
        first = {key: layer.importance.clone() for key, layer in state.layers.items()}
        step = model(tiny.prompt(1), past_key_values=cache).logits
        assert dict(state.passes) == {"prompt": 0, "decode": 1, "dense": 0}
        alone = generate(model, {"input_ids": tiny.prompt(9, seed=5)})[1]
        generate(model, {"input_ids": tiny.prompt(12, seed=6)})
        again = generate(model, {"input_ids": tiny.prompt(9, seed=5)})[1]
        assert torch.equal(alone, again)
        assert all(torch.equal(first[key], layer.importance) for key, layer in state.layers.items())
        assert "the weights' norms" in state.summary()
        state.reset()
        assert state.ready and torch.equal(generate(model, {"input_ids": tiny.prompt(9, seed=5)})[1], alone)
    assert torch.isfinite(step).all()


def test_what_is_predicted_is_by_the_norms_of_up_rows():
    model = MODELS["llama"].build()
    with popmm.pruned(model, statistics="weights", bytes=0.3) as state:
        ffn = state._ffns[0]
        expected = ffn.site.weights().up.norm(dim=-1)
        torch.testing.assert_close(ffn.layout.rms, expected.float().detach())


def test_prompts_are_dense_and_changed_weights_read_again():
    model, ids = MODELS["llama"].build(), tiny.prompt(9)
    with torch.no_grad():
        dense = model(ids).logits
        with popmm.pruned(model, statistics="weights", bytes=0.3) as state:
            assert torch.equal(model(ids).logits, dense)
            before = state._ffns[0].layout.rms.clone()
            model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
            model(ids)
            torch.testing.assert_close(state._ffns[0].layout.rms, 2 * before)
            assert model(tiny.prompt(1), past_key_values=DynamicCache()).logits.isfinite().all()


@pytest.mark.parametrize(
    "change", [dict(refresh_every=4), dict(modality_balance=0.5), dict(fill="mean"), dict(prefill="pruned")]
)
def test_settings_about_a_prompt_are_refused(change):
    with pytest.raises(ValueError, match="statistics='weights'"):
        popmm.PopConfig(statistics="weights", selection="gate", **change)

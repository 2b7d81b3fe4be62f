"""FFNs that a prompt gives few of its tokens, or none: they lean on their weights' norms, say so, hold up nobody."""

from __future__ import annotations

import inspect

import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import popmm
from popmm.runtime.prompt import PromptPass
from popmm.runtime.sequence import Sequence

CONFIG = popmm.PopConfig(ffn_ratio=0.5, selection="mask")


def gemma4():
    """Layers 2 and 3 share the keys and values of earlier ones, and read a prompt's last token alone."""
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no gemma4")
    from transformers.models.gemma4 import modeling_gemma4

    if "_maybe_slice_kv_shared_inputs" not in inspect.getsource(modeling_gemma4):
        pytest.skip("this transformers gives every layer all tokens")
    settings = {**tiny.COMMON, "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 8, "sliding_window": 8}
    settings |= dict(num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=tiny.VOCAB)
    return tiny.build(
        CONFIG_MAPPING["gemma4_text"](**settings, layer_types=["sliding_attention", "full_attention"] * 2)
    )


def _with_pictures(model_type: str, text: dict, vision: dict, **tokens):
    config = CONFIG_MAPPING[model_type](text_config={**tiny.COMMON, **text}, vision_config=vision, **tokens)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def mllama():
    """Its layer 1 attends to pictures, and is left out without one."""
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=2)
    vision |= dict(image_size=28, patch_size=14, vision_output_dim=32, intermediate_layers_indices=[0], max_num_tiles=1)
    text = dict(num_hidden_layers=4, cross_attention_layers=[1])
    return _with_pictures("mllama", text, {**vision, "supported_aspect_ratios": [[1, 1]]}, image_token_index=3)


def ernie():
    """Has experts for pictures beside those for text."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = dict(moe_intermediate_size=[24, 16], moe_k=2, moe_num_experts=4, moe_num_shared_experts=1)
    vision = dict(depth=1, hidden_size=16, embed_dim=16, intermediate_size=32, num_heads=2, out_hidden_size=32)
    tokens = dict(image_token_id=3, video_token_id=62, image_start_token_id=60, image_end_token_id=61)
    tokens |= dict(video_start_token_id=58, video_end_token_id=59)
    text |= dict(mlp_layer_types=["sparse"] * 2, rope_parameters=rope)
    return _with_pictures("ernie4_5_vl_moe", text, vision, **tokens)


UNSEEN = {
    gemma4: ["model.layers.2.mlp", "model.layers.3.mlp"],
    mllama: ["model.language_model.layers.1.mlp"],
    ernie: [f"model.language_model.layers.{i}.mlp.vision_moe.experts" for i in (0, 1)],
}


@pytest.mark.parametrize("selection", ["mask", "keep", "gate"])
@pytest.mark.parametrize("build", UNSEEN)
def test_a_site_without_tokens_keeps_no_other_dense(build, selection):
    model = build()
    with popmm.pruned(model, ffn_ratio=0.5, selection=selection) as state:
        dense = [p.clone() for p in model.parameters()]
        model.generate(tiny.prompt(12), max_new_tokens=5, do_sample=False)
        assert dict(state.passes) == {"prompt": 1, "decode": 4, "dense": 0}
        seen = {name: int(partition.tokens.sum()) for name, partition in state.layers.items()}
        assert all((n < 12) == (name in UNSEEN[build]) for name, n in seen.items())
        assert set(state.notes()) == set(UNSEEN[build])
        given = "1 of the prompt's 12 tokens" if build is gemma4 else "no token of the prompt"
        assert all(f"was given {given}" in note for note in state.notes().values())
        assert given in state.summary()
    assert all(map(torch.equal, model.parameters(), dense))


@pytest.mark.parametrize("build", UNSEEN)
def test_padding_and_beams_change_no_partition(build):
    model, ids = build(), tiny.prompt(12)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    with popmm.pruned(model, CONFIG) as state:
        model.generate(ids, max_new_tokens=2, do_sample=False)
        plain = {name: partition for name, partition in state.layers.items()}
        model.generate(padded, attention_mask=(padded != 0).long(), max_new_tokens=3, do_sample=False, num_beams=2)
        for name, partition in state.layers.items():
            assert torch.equal(partition.tokens, plain[name].tokens), name
            torch.testing.assert_close(partition.importance, plain[name].importance, atol=1e-5, rtol=1e-4)


def test_an_unseen_ffn_is_ranked_by_its_weights_norms():
    model = mllama()
    mlp = model.model.language_model.layers[1].mlp
    gate, up, down = (layer.weight.detach() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    norms = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    with popmm.pruned(model, CONFIG) as state:
        model.generate(tiny.prompt(12), max_new_tokens=2, do_sample=False)
        partition = state.layers["model.language_model.layers.1.mlp"]
        order = torch.cat([partition.retained, partition.candidate, partition.pruned])
        assert order.tolist() == norms.argsort(descending=True, stable=True).tolist()


def test_few_tokens_are_blended_with_the_norms():
    model, seen = gemma4(), []
    mlp = model.model.layers[2].mlp
    handle = mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, -1].detach()))
    gate, up, down = (layer.weight.detach() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    norms = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    model.generate(tiny.prompt(12), max_new_tokens=1, do_sample=False)
    handle.remove()
    own = seen[0].abs() * down.norm(dim=0)
    expected = own / 33 + norms * own.mean() / norms.mean() * 32 / 33
    with popmm.pruned(model, CONFIG) as state:
        model.generate(tiny.prompt(12), max_new_tokens=2, do_sample=False)
        found = state.layers["model.layers.2.mlp"].importance
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_rows_of_an_ffn_are_told_by_their_number():
    counted = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    image = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    prompt = PromptPass(Sequence(None), (2, 6), 0, counted, {"image": image})
    assert prompt.tokens == 10 and prompt.groups_of(12) is prompt.groups
    assert prompt.groups_of(5)["image"].all()  # those of the pictures
    text = prompt.groups_of(7)
    assert list(text) == ["text"] and text["text"].tolist() == [False, False, True, True, True, True, True]
    last = prompt.groups_of(4)  # two of each sequence
    assert last["image"].tolist() == [True, False, False, False]
    assert last["text"].tolist() == [False, True, True, True]
    assert prompt.groups_of(11) == {}
    plain = PromptPass(Sequence(None), (2, 6), 0, None, None)
    assert plain.groups_of(11) == {"text": None}

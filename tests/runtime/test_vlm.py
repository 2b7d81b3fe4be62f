"""Vision-language models: partitions from joint image and text prefill, against independent computations."""

import itertools
import math

import independent
import independent_experts
import pytest
import tiny
import tiny_vlm
import torch
from popmm.adapters.base import find_decoder

import popmm
from popmm.method import reference

RATIO = 0.4
CONFIG = popmm.PopConfig(ffn_ratio=RATIO, candidate_fraction=0.2, prior_tokens=0)
SIZES = {"one size": False, "two sizes": True}


def row(batch, i):
    """Row i of a batch with one picture per row, its padding cut off."""
    keep = batch["attention_mask"][i].bool()
    alone = {k: v[i : i + 1, keep] for k, v in batch.items() if k.endswith(("_ids", "_mask"))}
    if "image_grid_thw" in batch:
        patches = batch["image_grid_thw"].prod(1)
        start = int(patches[:i].sum())
        alone["pixel_values"] = batch["pixel_values"][start : start + int(patches[i])]
        alone["image_grid_thw"] = batch["image_grid_thw"][i : i + 1]
    else:
        alone |= {k: batch[k][i : i + 1] for k in ("pixel_values", "image_sizes") if k in batch}
    return alone


@torch.no_grad()
def read_tokens(model, batch):
    """{FFN name: [(h [d_ff], down, expert, is_image)]} of a batch's tokens, each row read by itself, densely."""
    decoder = find_decoder(model)
    prefix = next(name for name, m in model.named_modules() if m is decoder)
    experts = independent_experts.experts_of(decoder)
    result = {}
    for i in range(len(batch["input_ids"])):
        alone = row(batch, i)
        image = (alone["input_ids"][0] == tiny_vlm.IMAGE).tolist()
        if experts:
            with independent_experts.routed(decoder) as seen:
                model(**alone)
            for name, [(x, index, _)] in seen.items():
                rows = result.setdefault(f"{prefix}.{name}", [])
                for t, k in itertools.product(range(len(x)), range(index.shape[1])):
                    e = int(index[t, k])
                    h = independent_experts.expert_h(experts[name], e, x[t : t + 1])[0]
                    rows.append((h, independent_experts.expert_down(experts[name], e), e, image[t]))
        else:
            with independent.captured(decoder) as seen:
                model(**alone)
            for j, (mlp, h) in enumerate(zip(independent.mlps(decoder), seen)):
                rows = result.setdefault(f"{prefix}.layers.{j}.mlp", [])
                rows += [(h[0, t], mlp.down_proj.weight, None, image[t]) for t in range(h.shape[1])]
    return result


def weighted_importance(tokens, share=None):
    """Scores of one FFN or expert from its tokens; image and text tokens weigh by share."""
    n_text = sum(not image for *_, image in tokens["all"])
    n_image = len(tokens["all"]) - n_text
    total = 0.0
    for h, down, _, image in tokens["own"]:
        weight = 1.0
        if share is not None:
            weight = (1 - share) / n_image if image else share / n_text
        total = total + weight * torch.tensor(reference.token_score("wanda", h, down), dtype=torch.double) ** 2
    return total.sqrt().tolist()


def assert_partition(state, read, share=None):
    assert list(state.layers) == list(read)
    for name, tokens in read.items():
        p = state.layers[name]
        for e in sorted({token[2] for token in tokens}, key=str):
            own = [token for token in tokens if token[2] == e]
            scores = weighted_importance({"all": tokens, "own": own}, share)
            expected = reference.partition(scores, p.budget, 0.2)
            parts = (p.retained, p.candidate, p.pruned)
            assert tuple((x if e is None else x[e]).tolist() for x in parts) == expected, (name, e)
            counts = {m: int(n if e is None else n[e]) for m, n in p.tokens_by_modality.items()}
            assert counts == {"text": sum(not t[3] for t in own), "image": sum(t[3] for t in own)}


@pytest.mark.parametrize("name", tiny_vlm.VLMS)
@pytest.mark.parametrize("wide", SIZES.values(), ids=SIZES)
def test_left_padded_batch_of_two_pictures_has_their_pooled_partition(name, wide):
    model = tiny_vlm.build(name)
    batch = tiny_vlm.inputs(model, name, [1, 2], wide=wide)
    read = read_tokens(model, batch)
    with popmm.pruned(model, CONFIG) as state:
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        assert_partition(state, read)


@pytest.mark.parametrize("name", tiny_vlm.VLMS)
def test_partition_changes_with_the_picture_alone(name):
    model = tiny_vlm.build(name)
    found = []
    with popmm.pruned(model, CONFIG) as state:
        for seed in (1, 2, 1):
            model.generate(**tiny_vlm.inputs(model, name, [seed]), max_new_tokens=1)
            found.append({k: (p.retained.tolist(), p.candidate.tolist()) for k, p in state.layers.items()})
    assert found[0] != found[1] and found[0] == found[2]


@pytest.mark.parametrize("name", tiny_vlm.VLMS)
def test_detach_gives_a_pruned_vision_tower_back(name):
    model = tiny_vlm.build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch = tiny_vlm.inputs(model, name, [1, 2], wide=True)
    how = dict(max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    dense = model.generate(**batch, **how)
    with popmm.pruned(model, ffn_ratio=0.4, vision="prune"):
        model.generate(**batch, **how)
    again = model.generate(**batch, **how)
    assert torch.equal(again.sequences, dense.sequences)
    assert all(map(torch.equal, again.logits, dense.logits))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "qwen3-vl-moe", "gemma3"])
@pytest.mark.parametrize("share", [0.1, 0.8])
def test_modality_balance_weighs_text_against_pictures(name, share):
    model = tiny_vlm.build(name)
    batch = tiny_vlm.inputs(model, name, [1, 2])
    read = read_tokens(model, batch)
    with popmm.pruned(model, CONFIG.replace(modality_balance=share)) as state:
        model.generate(**batch, max_new_tokens=1)
        assert_partition(state, read, share)
        balanced = {k: p.retained.tolist() for k, p in state.layers.items()}
    with popmm.pruned(model, CONFIG) as state:
        model.generate(**batch, max_new_tokens=1)
        assert balanced != {k: p.retained.tolist() for k, p in state.layers.items()}


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "qwen3-vl", "internvl"])
@pytest.mark.parametrize("keep", [False, True])
def test_decode_steps_equal_the_reference(name, keep):
    model = tiny_vlm.build(name)
    decoder = find_decoder(model)
    batch = tiny_vlm.inputs(model, name, [1])
    continuation = tiny.prompt(5, seed=9)[0].clamp(4, 59)
    config = CONFIG.replace(selection="keep" if keep else "mask")

    def steps():
        cache = model(**batch, use_cache=True).past_key_values
        return torch.stack([model(t.view(1, 1), past_key_values=cache).logits[0, -1] for t in continuation])

    with torch.no_grad():
        with popmm.pruned(model, config) as state:
            found = steps()
            partitions = [independent.channels(p) for p in state.layers.values()]
            budget = next(iter(state.layers.values())).budget
        cache = model(**batch, use_cache=True).past_key_values
        with independent.masked(decoder, partitions, budget, keep=keep):
            expected = [model(t.view(1, 1), past_key_values=cache).logits[0, -1] for t in continuation]
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", tiny_vlm.VLMS)
def test_prompts_without_a_picture(name):
    model = tiny_vlm.build(name)
    ids = tiny.prompt(9).clamp(4, 59)
    with popmm.pruned(model, CONFIG) as state:
        model.generate(ids, max_new_tokens=3, do_sample=False)
        assert list(next(iter(state.layers.values())).tokens_by_modality) == ["text"]
        alone = {k: p.retained.tolist() for k, p in state.layers.items()}
        model.generate(**tiny_vlm.inputs(model, name, [1]), max_new_tokens=3, do_sample=False)
        model.generate(ids, max_new_tokens=3, do_sample=False)
        assert alone == {k: p.retained.tolist() for k, p in state.layers.items()}


def test_two_pictures_in_one_prompt_and_a_batch_with_one_picture():
    model = tiny_vlm.build("qwen2-vl")
    one, two = (tiny_vlm.inputs(model, "qwen2-vl", [seed]) for seed in (1, 2))
    both = {k: torch.cat([one[k], two[k]], dim=1 if v.shape[0] == 1 and v.ndim == 2 else 0) for k, v in one.items()}
    both["image_grid_thw"] = torch.cat([one["image_grid_thw"], two["image_grid_thw"]])
    mixed = tiny_vlm.inputs(model, "qwen2-vl", [1, None])
    with popmm.pruned(model, CONFIG) as state:
        for batch in (both, mixed):
            model.generate(**batch, max_new_tokens=2, do_sample=False)
            counts = {k: int(v) for k, v in next(iter(state.layers.values())).tokens_by_modality.items()}
            image = int((batch["input_ids"] == tiny_vlm.IMAGE).sum())
            assert counts == {"text": int(batch["attention_mask"].sum()) - image, "image": image}


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl"])
def test_video_tokens_are_counted_as_video(name):
    model = tiny_vlm.build(name)
    frames = torch.randn(2 * 16, 96)
    ids = torch.cat([tiny.prompt(4), torch.full((1, 8), tiny_vlm.VIDEO), tiny.prompt(3, seed=2)], dim=1)
    ids[0, 3], ids[0, 12] = tiny_vlm.VISION_START, tiny_vlm.VISION_END
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == tiny_vlm.VIDEO).int(),
        "pixel_values_videos": frames,
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    with popmm.pruned(model, CONFIG.replace(modality_balance=0.5)) as state:
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        counts = next(iter(state.layers.values())).tokens_by_modality
        assert {k: int(v) for k, v in counts.items()} == {"text": 7, "video": 8}


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "qwen3-vl", "qwen3-vl-moe"])
def test_a_second_question_about_the_picture_on_the_kept_cache(name):
    model = tiny_vlm.build(name)
    batch = tiny_vlm.inputs(model, name, [1])
    how = dict(do_sample=False, return_dict_in_generate=True)
    pictures = ("pixel_values", "image_sizes", "image_grid_thw")
    with popmm.pruned(model, CONFIG) as state:
        first = model.generate(**batch, max_new_tokens=3, **how)
        question = tiny.prompt(4, seed=5).clamp(4, 59)
        ids = torch.cat([first.sequences, question], dim=1)
        follow_up = {k: v for k, v in batch.items() if k not in pictures}
        follow_up |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in batch:
            follow_up["mm_token_type_ids"] = (ids == tiny_vlm.IMAGE).int()
        model.generate(**follow_up, past_key_values=first.past_key_values, max_new_tokens=3, **how)
        p = next(iter(state.layers.values()))
        per_token = 2 if name == "qwen3-vl-moe" else 1
        image = int((batch["input_ids"] == tiny_vlm.IMAGE).sum())
        # the last token of the answer was never fed back, so it is read with the question
        text = batch["input_ids"].shape[1] - image + 1 + question.shape[1]
        assert {k: int(v.sum()) // per_token for k, v in p.tokens_by_modality.items()} == {
            "text": text,
            "image": image,
        }


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_embeddings_in_place_of_token_ids(name):
    model = tiny_vlm.build(name)
    batch = tiny_vlm.inputs(model, name, [1])
    read = read_tokens(model, batch)
    ids = batch.pop("input_ids")
    if name == "qwen2-vl":  # positions come from the ids
        batch |= {
            "position_ids": model.model.get_rope_index(ids, **{k: batch[k] for k in batch if k != "pixel_values"})[0]
        }
        batch.pop("mm_token_type_ids")
    with popmm.pruned(model, CONFIG) as state, torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), **batch)
        assert_partition(state, read)


def test_a_decoded_placeholder_is_no_picture():
    model = tiny_vlm.build("llava")
    with popmm.pruned(model, CONFIG) as state, torch.no_grad():
        cache = model(**tiny_vlm.inputs(model, "llava", [1])).past_key_values
        before = next(iter(state.layers.values()))
        model(torch.tensor([[tiny_vlm.IMAGE]]), past_key_values=cache)
        assert next(iter(state.layers.values())) is before


def test_a_failed_pass_keeps_the_modalities_apart():
    model = tiny_vlm.build("llava")
    batch = tiny_vlm.inputs(model, "llava", [1])
    with popmm.pruned(model, CONFIG) as state, torch.no_grad():
        with pytest.raises(ValueError, match="do not match"):
            model(**{**batch, "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)})
        assert not state.ready
        find_decoder(model)(batch["input_ids"])  # the language model by itself knows of no pictures
        assert list(next(iter(state.layers.values())).tokens_by_modality) == ["text"]


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "qwen2.5-vl", "gemma3"])
def test_vision_tower_is_pruned_by_the_prompt_rule(name):
    model = tiny_vlm.build(name)
    batch = tiny_vlm.inputs(model, name, [1])
    seen = {}
    with popmm.pruned(model, CONFIG.replace(vision="prune")) as state:
        for ffn in state._tower:
            ffn.down.register_forward_pre_hook(lambda m, args, key=ffn.name: seen.update({key: args[0].flatten(0, -2)}))
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        assert list(state.vision) == [ffn.name for ffn in state._tower]
        downs = {ffn.name: ffn.down for ffn in state._tower}
    for name_, p in state.vision.items():
        d_ff = downs[name_].in_features
        assert p.budget == round((1 - RATIO) * d_ff) and not p.candidate.numel()
        assert (seen[name_][:, p.pruned] == 0).all() and (seen[name_][:, p.retained] != 0).any(0).all()
    # the first block's input does not depend on pruning
    first = next(iter(downs))
    with torch.no_grad():
        handle = downs[first].register_forward_pre_hook(lambda m, args: seen.update(dense=args[0].flatten(0, -2)))
        model(**batch)
        handle.remove()
    scores = reference.prompt_importance("wanda", seen["dense"], downs[first].weight)
    assert state.vision[first].retained.tolist() == reference.partition(scores, state.vision[first].budget, 0)[0]
    for ffn in state._tower:
        ffn.down._forward_pre_hooks.clear()


def test_vision_ratio_counts_the_towers_own_blocks():
    model = tiny_vlm.build("llava")  # blocks of 4 d^2 attention and 2 d d_ff FFN weights, d_ff = 2 d
    with popmm.pruned(model, pruning_ratio=0.2, vision="prune") as state:
        assert {ffn.sizes.budget for ffn in state._tower} == {round((1 - 0.2 * 8 / 4) * 32)}


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(modality_balance=0.5), "modality_balance=0.5: this LlamaForCausalLM reads text alone"),
        (dict(vision="prune"), "vision='prune': this LlamaForCausalLM has no vision tower"),
    ],
)
def test_text_models_refuse_settings_for_pictures(llama, settings, message):
    with pytest.raises(ValueError, match=message):
        popmm.attach(llama, **settings)
    assert not any("forward" in m.__dict__ for m in llama.modules())


@pytest.mark.parametrize("value", [0, 1, -0.5, math.nan, "half", True])
def test_bad_modality_balance(value):
    with pytest.raises(ValueError, match="modality_balance=.*give the text tokens' share"):
        popmm.PopConfig(modality_balance=value)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}], ids=str)
@pytest.mark.parametrize("name", ["qwen2-vl", "qwen3-vl-moe"])
def test_beams_and_several_answers_count_a_prompt_once(name, how):
    model = tiny_vlm.build(name)
    batch = tiny_vlm.inputs(model, name, [1])
    found = []
    with popmm.pruned(model, CONFIG.replace(prior_tokens=32)) as state:
        for settings in ({}, how):
            model.generate(**batch, max_new_tokens=2, **settings)
            p = next(iter(state.layers.values()))
            found.append((p.tokens.tolist(), p.retained.tolist(), p.tokens_by_modality["image"].tolist()))
    assert found[0] == found[1]


def test_reset_forgets_the_vision_tower_too():
    model = tiny_vlm.build("llava")
    with popmm.pruned(model, CONFIG.replace(vision="prune")) as state:
        model.generate(**tiny_vlm.inputs(model, "llava", [1]), max_new_tokens=1)
        assert state.vision
        state.reset()
        assert not state.vision and not state.layers

"""Ranks over decode steps are those of the dense model's own activations."""

import pytest
import tiny
import torch

from popmm.evaluation.dynamics import record


@torch.no_grad()
def test_ranks_are_those_of_the_dense_models_scores(llama):
    prompt = tiny.prompt(12)
    layers = record(llama, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, 5)
    text = llama.generate(prompt, do_sample=False, max_new_tokens=6)
    mlp, seen = llama.model.layers[1].mlp, {}
    handle = mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.update(h=args[0][0]))
    llama(text[:, :-1])
    handle.remove()
    norm = mlp.down_proj.weight.norm(dim=0)
    prompt_order = (seen["h"][:12].square().sum(0).sqrt() * norm).argsort(descending=True)
    found = layers["model.layers.1.mlp"]
    assert len(found.ranks) == 5
    assert torch.equal(found.prompt_ranks.argsort(), prompt_order)
    for i, ranks in enumerate(found.ranks):
        order = (seen["h"][12 + i].abs() * norm).argsort(descending=True)
        assert torch.equal(ranks.argsort(), order)
        shared = len(set(order[:40].tolist()) & set(prompt_order[:40].tolist()))
        assert found.overlap[i].item() == pytest.approx(shared / 40)
    assert found.sampled_ranks.shape[0] == 6 and found.sampled_ranks[0, 0] == 0


def test_experts_alone_have_no_ranks_to_follow():
    ids = tiny.prompt(5)
    with pytest.raises(ValueError, match="this model has experts alone"):
        record(tiny.moe("mixtral"), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 3)

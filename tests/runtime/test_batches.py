"""In a batch the tokens of a step choose together with ``tiers``: the same bytes serve them all."""

import pytest
import tiny
import torch
import torch._dynamo.utils
from matrix import MODELS

import popmm
from popmm.kernels import operators
from popmm.runtime import wrappers

HOW = dict(do_sample=False, max_new_tokens=6, min_new_tokens=6)
SETTINGS = dict(bytes=0.3)


def batch(model, ids, **more):
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**HOW, **more})


@pytest.mark.parametrize("name", ["llama", "llama-bias", "phi3", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("n", [2, 5, 20])
def test_all_rows_read_the_same_channels(name, n):
    model = MODELS[name].build()
    with popmm.pruned(model, **SETTINGS) as state, state.trace() as trace:
        batch(model, tiny.prompt(9, batch=n))
        for masks in trace.values():
            assert masks.shape[1] == n and (masks == masks[:, :1]).all()
            assert int(masks[0, 0].sum()) == sum(count for _, count in state._ffns[0].sizes_of(n).tiers)


def test_rows_that_are_alike_get_one_text_however_many_they_are():
    model = MODELS["llama"].build()
    with popmm.pruned(model, **SETTINGS):
        two = batch(model, tiny.prompt(9).repeat(2, 1))
        five = batch(model, tiny.prompt(9).repeat(5, 1))
    assert torch.equal(five, two[:1].repeat(5, 1))


def test_a_batch_reads_the_bytes_that_were_asked_for_and_more_by_default():
    """What few tokens of a batch need is read in fewer bits rather than dropped."""
    model = MODELS["llama"].build()
    with popmm.pruned(model, bytes=0.33) as state:
        (one, dense), (many, of_many) = state.bytes_per_step(1), state.bytes_per_step(7)
        assert of_many == dense and many == pytest.approx(one, rel=0.03)
        assert state.channels_skipped(7) < state.channels_skipped() / 2
        alone, together = (dict(state._ffns[0].sizes_of(n).tiers) for n in (1, 7))
        assert together[8] < alone[8] and together[4] > alone[4]
        with pytest.raises(ValueError, match="batch=0: give a number of sequences"):
            state.bytes_per_step(0)
    with popmm.pruned(model) as state:  # float32: half of the share at 16 bits
        assert state.bytes_per_step(4)[0] / dense == pytest.approx(0.36 / 2, rel=0.03)
        assert "it reads 18." in state.summary()


def test_the_order_of_rows_does_not_matter():
    model, ids = MODELS["llama"].build(torch.float64), tiny.prompt(9, batch=4)
    with popmm.pruned(model, **SETTINGS):
        assert torch.equal(batch(model, ids.flip(0)).flip(0), batch(model, ids))


def test_rows_that_have_ended_have_no_vote():
    """What their padding would have chosen does not change what the others read."""
    model, ids = MODELS["llama"].build(torch.float64), tiny.prompt(9, batch=3)
    with popmm.pruned(model, **SETTINGS) as state:
        free = batch(model, ids, max_new_tokens=12)
        end = int(free[0, 11])
        goes_on = [row for row in range(3) if end not in free[row, 9:].tolist()]
        assert goes_on
        seen = {}
        for filler in (1, 2):
            with state.trace() as trace:
                how = dict(max_new_tokens=12, min_new_tokens=0, eos_token_id=end, pad_token_id=filler)
                found = batch(model, ids, **how)
                seen[filler] = {key: masks.clone() for key, masks in trace.items()}
            assert found.shape == free.shape
        assert all(torch.equal(seen[1][key], seen[2][key]) for key in seen[1])


@pytest.mark.skipif(not operators.available(), reason="no C++ compiler")
def test_compiled_steps_choose_as_eager_ones(monkeypatch):
    monkeypatch.setattr(wrappers, "LARGE", 0)
    torch._dynamo.reset()
    model = MODELS["llama"].build()
    with popmm.pruned(model, **SETTINGS) as state:
        counts = []
        for seed in (1, 2, 3):
            ids = tiny.prompt(9, batch=3, seed=seed)
            assert torch.equal(batch(model, ids, cache_implementation="static"), batch(model, ids))
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert counts[0] == counts[-1] and state.passes["dense"] == 0


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_experts_go_on_choosing_for_each_token(name):
    model = MODELS[name].build()
    with popmm.pruned(model, **SETTINGS) as state:
        alone = torch.cat([batch(model, row[None]) for row in tiny.prompt(9).repeat(2, 1)])
        assert torch.equal(batch(model, tiny.prompt(9).repeat(2, 1)), alone)
        assert state.passes["dense"] == 0


@pytest.mark.parametrize("selection", ["mask", "keep"])
def test_the_papers_selections_stay_as_they_are(selection):
    model, ids = MODELS["llama"].build(), tiny.prompt(9, batch=3)
    with popmm.pruned(model, selection=selection, ffn_ratio=0.4, candidate_fraction=0.4) as state:
        with state.trace() as trace:
            batch(model, ids)
        if selection == "mask":
            masks = next(iter(trace.values()))
            assert not (masks == masks[:, :1]).all()

"""What popmm promises of every model and setting, once each."""

from __future__ import annotations

import matrix
import pytest
import tiny
import torch
from matrix import MODELS, each_dtype, each_layout, each_model, generate

import popmm


@each_dtype
@each_model(others=("mask", "gate 4"))
def test_ratio_0_is_the_dense_model_exactly(case, selection, dtype):
    model = case.build(dtype)
    inputs = case.prompt(model)
    tokens, logits = generate(model, inputs)
    with popmm.pruned(model, matrix.config(selection, ffn_ratio=0.0)) as state:
        again, theirs = generate(model, inputs)
        assert state.ready and state.is_dense and state.channels_skipped() == 0
    assert torch.equal(again, tokens) and torch.equal(theirs, logits)


def _hooks(module) -> list[int]:
    tables = sorted((name, value) for name, value in vars(module).items() if "hook" in name)
    return [len(value) for _, value in tables if isinstance(value, dict)]


def _what_it_is_made_of(model) -> dict:
    parts = {name: (value.clone(), value.stride(), value.data_ptr()) for name, value in model.state_dict().items()}
    attributes = {name: sorted(m.__dict__) for name, m in model.named_modules()}
    hooks = {name: _hooks(m) for name, m in model.named_modules()}
    text = getattr(model.config.get_text_config(), "_experts_implementation", None)
    return {"weights": parts, "attributes": attributes, "hooks": hooks, "experts": text}


@each_layout
@each_model()
def test_detach_gives_back_bytes_strides_places_and_attributes(case, selection, layout):
    model = case.build()
    inputs = case.prompt(model)
    tokens, logits = generate(model, inputs)  # leaves what generate leaves on a model
    before = _what_it_is_made_of(model)
    with pytest.raises(KeyError), popmm.pruned(model, matrix.config(selection, layout=layout)):
        for seed in range(3):
            generate(model, case.prompt(model, seed), new=2)
        raise KeyError("body")
    after = _what_it_is_made_of(model)
    for name, (value, *place) in before["weights"].items():
        found, *now = after["weights"][name]
        assert torch.equal(found, value) and now == place, name
    assert all(after[part] == before[part] for part in ("attributes", "hooks", "experts"))
    again, theirs = generate(model, inputs)
    assert torch.equal(again, tokens) and torch.equal(theirs, logits)


@each_model()
def test_permuted_weights_compute_what_copied_ones_do(case, selection):
    model, found = case.build(), {}
    for layout in matrix.LAYOUTS:
        with popmm.pruned(model, matrix.config(selection, layout=layout)) as state:
            rows = []
            for seed in range(3):
                with state.trace() as trace:
                    tokens, logits = generate(model, case.prompt(model, seed))
                rows.append((tokens, logits, dict(trace), dict(state.layers)))
            found[layout] = rows
    ties = case.name in matrix.TIES
    for (tokens, logits, trace, layers), (theirs, their_logits, their_trace, their_layers) in zip(*found.values()):
        if not ties or matrix.config(selection).fill == "zero":
            torch.testing.assert_close(logits, their_logits, atol=2e-5, rtol=1e-3)
            assert torch.equal(tokens, theirs)
        assert trace.keys() == their_trace.keys()
        for name, partition in layers.items():
            assert torch.equal(trace[name], their_trace[name]) or ties
            assert all(
                torch.equal(getattr(partition, p), getattr(their_layers[name], p)) for p in ("retained", "candidate")
            )
            torch.testing.assert_close(partition.importance, their_layers[name].importance, atol=1e-6, rtol=1e-4)


@each_layout
@each_model()
def test_k_channels_pass_for_each_token_layer_and_sequence(case, selection, layout):
    model = case.build()
    inputs = case.prompt(model)
    # what predicts, in larger batches, computes all the channels whose gate rows it reads (tests of its layout)
    if not case.pictures and not matrix.config(selection).predicts:
        inputs = {"input_ids": tiny.prompt(9, batch=3), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    batch = len(inputs["input_ids"])
    with popmm.pruned(model, matrix.config(selection, layout=layout)) as state:
        with state.trace() as trace:
            generate(model, inputs, new=5)
        for name, p in state.layers.items():
            mask, shape = trace[name], p.importance.shape
            assert mask.shape == (4, batch, *shape)
            passed = p.sizes.read if selection == "keep" else p.budget
            routed = mask.any(-1)  # of experts, those that a token was sent to
            assert routed.sum() == (routed.numel() if len(shape) == 1 else 4 * batch * state_top_k(state, name))
            assert (mask.sum(-1)[routed] == passed).all()
            off = torch.zeros(shape, dtype=torch.bool).scatter(-1, p.pruned, True)
            always = torch.zeros(shape, dtype=torch.bool).scatter(-1, p.retained, True)
            assert not (mask & off).any()
            assert (mask | ~always | ~routed.unsqueeze(-1)).all()
            assert p.budget == round(0.6 * shape[-1]) or state.config.predicts


def state_top_k(state, name: str) -> int:
    return next(ffn.site.top_k for ffn in state._ffns if ffn.name == name)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@each_model()
def test_padding_and_batch_order_change_no_partition(case, selection, cache):
    model = case.build()
    short, long = tiny.prompt(6, seed=1)[0], tiny.prompt(14, seed=2)[0]
    ids = torch.stack([torch.nn.functional.pad(short, (8, 0)), long])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(short), (8, 0)), torch.ones_like(long)])
    with popmm.pruned(model, matrix.config(selection)) as state:

        def partition(ids, mask) -> dict:
            generate(model, {"input_ids": ids, "attention_mask": mask}, new=2, cache_implementation=cache)
            return dict(state.layers)

        same = [
            (partition(short[None], torch.ones(1, 6, dtype=torch.long)), partition(ids[:1], mask[:1])),
            (partition(ids, mask), partition(ids.flip(0), mask.flip(0))),
        ]
        for one, other in same:
            for name, p in one.items():
                torch.testing.assert_close(other[name].importance, p.importance, atol=1e-5, rtol=1e-4)
                for part in ("retained", "candidate", "tokens"):
                    assert torch.equal(getattr(other[name], part), getattr(p, part)), (name, part)
        alone, both = same[0][0], same[1][0]
        learns = state.config.statistics == "prompt"
        assert learns == any(not torch.equal(alone[name].importance, both[name].importance) for name in alone)


@each_dtype
@each_model(others=(), selections=("mask", "gate 4"))
def test_statistics_are_float32_and_the_same_seed_gives_the_same_tokens(case, selection, dtype):
    model = case.build(dtype)
    inputs, how = case.prompt(model), dict(max_new_tokens=5, do_sample=True)
    with popmm.pruned(model, matrix.config(selection)) as state:
        texts = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            texts.append(model.generate(**inputs, **how))
        assert all(p.importance.dtype == torch.float32 for p in state.layers.values())
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_the_matrix_holds_every_form():
    assert set(matrix.FORMS) <= set(MODELS)

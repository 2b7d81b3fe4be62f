"""Lossless decoding: the pruned model drafts, and the text, the scores and the random numbers are the dense model's."""

import warnings

import pytest
import tiny
import tiny_families
import torch
import torch._dynamo.utils
from matrix import MODELS, generate

import popmm
from popmm import compat
from popmm.kernels import operators
from popmm.runtime import wrappers

DRAFTS = {
    "tiers": {},
    "few bits": dict(bytes=0.2),
    "stateless": dict(statistics="weights"),
    "gate": dict(selection="gate", ffn_ratio=0.5),
    "mask": dict(selection="mask", ffn_ratio=0.6),
    "keep": dict(selection="keep", ffn_ratio=0.4, layout="copy"),
}
COMPILED = [("llama", torch.float64), ("llama", torch.float32), ("mixtral", torch.float32)]
SAMPLED = dict(do_sample=True, temperature=0.9, top_k=20, top_p=0.95, repetition_penalty=1.2)


def exact(case):
    """In float64, where a pass of several tokens and several passes of one choose the same tokens."""
    model = case.build(torch.float64)
    model.set_experts_implementation("eager")  # torch's grouped product knows no float64
    return model


def text(model, inputs, seed=5, new=12, **settings):
    """Tokens of one ``generate``, and the next random number after it."""
    torch.manual_seed(seed)
    settings = {"do_sample": False, **settings}
    found = model.generate(**inputs, max_new_tokens=new, **settings)
    return found, float(torch.rand(1))


def checked(state, n_tokens):
    """Each token of a text is the prompt's, an accepted one, or the whole model's own."""
    assert state.passes["prompt"] == 1 and state.passes["dense"] == 0
    assert n_tokens == 1 + state.passes["verify"] + state.passes.accepted


@pytest.mark.parametrize("name", MODELS)
def test_greedy_and_sampled_texts_are_the_dense_models(name):
    case = MODELS[name]
    model = exact(case)
    inputs = case.prompt(model)
    for how in ({}, SAMPLED):
        expected = text(model, inputs, **how)
        with popmm.pruned(model, lossless=True, draft_tokens=3) as state:
            found = text(model, inputs, **how)
            assert torch.equal(found[0], expected[0]) and found[1] == expected[1]
            checked(state, expected[0].shape[1] - inputs["input_ids"].shape[1])
            assert state.passes["decode"] == state.passes.drafted > 0


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("name", ["llama", "qwen2-moe"])
def test_whatever_drafts(name, draft):
    case = MODELS[name]
    model = exact(case)
    inputs = case.prompt(model)
    expected = text(model, inputs, **SAMPLED)
    with popmm.pruned(model, lossless=True, draft_tokens=4, **DRAFTS[draft]):
        found = text(model, inputs, **SAMPLED)
        assert torch.equal(found[0], expected[0]) and found[1] == expected[1]


@pytest.mark.parametrize("family", ["gemma3n_text", "recurrent_gemma", "hrm_text", "lfm2", "falcon_h1"])
def test_other_caches_draft_or_say_that_they_do_not(family):
    if family not in tiny_families.KNOWN:
        pytest.skip("unknown to this version")
    model = tiny_families.build(family).to(torch.float64)
    inputs = {"input_ids": tiny.prompt(9)}
    expected = text(model, inputs)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with popmm.pruned(model, lossless=True, draft_tokens=3) as state:
            assert torch.equal(text(model, inputs)[0], expected[0])
    told = any("lossless" in str(w.message) for w in said)
    assert told == (state.passes.drafted == 0) == (state.passes["dense"] > 0)


@pytest.mark.parametrize("window", [6, 32])
@pytest.mark.parametrize("how", [{}, dict(cache_implementation="static")])
def test_sliding_windows(window, how):
    model = tiny.from_name(
        "gemma3_text",
        **tiny.COMMON,
        head_dim=8,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"],
    ).to(torch.float64)
    inputs = {"input_ids": tiny.prompt(9)}
    expected = text(model, inputs, new=24)
    with popmm.pruned(model, lossless=True, draft_tokens=3) as state:
        assert torch.equal(text(model, inputs, new=24, **how)[0], expected[0])
        assert state.passes.drafted > 0


@pytest.fixture
def any_size(monkeypatch):
    monkeypatch.setattr(wrappers, "LARGE", 0)
    torch._dynamo.reset()


@pytest.mark.skipif(not operators.available(), reason="no C++ compiler")
@pytest.mark.parametrize(
    "name, dtype", [("llama", torch.float64), ("llama", torch.float32), ("mixtral", torch.float32)]
)
@pytest.mark.filterwarnings("error:popmm. .* passes are not compiled")
def test_compiled_steps_have_three_forms_and_no_more(name, dtype, any_size):
    model = MODELS[name].build(dtype)
    static = dict(cache_implementation="static")
    prompts = [{"input_ids": tiny.prompt(n, seed=n)} for n in (9, 14, 21)]
    expected = [text(model, inputs, **SAMPLED) for inputs in prompts]
    with popmm.pruned(model, lossless=True) as state:
        counts = []
        for inputs, dense in zip(prompts * 2, expected * 2):
            found = text(model, inputs, **SAMPLED, **static)
            assert dtype != torch.float64 or (torch.equal(found[0], dense[0]) and found[1] == dense[1])
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert counts[-1] == counts[2]
        assert state.passes["dense"] == 0 and state.passes["verify"] > 0


@pytest.mark.parametrize("new", range(1, 8))
@pytest.mark.parametrize("how", [{}, dict(cache_implementation="static")])
def test_a_text_ends_where_it_ends(new, how):
    model = exact(MODELS["llama"])
    inputs = MODELS["llama"].prompt(model)
    expected = text(model, inputs, new=new)[0]
    with popmm.pruned(model, lossless=True, draft_tokens=4) as state:
        assert torch.equal(text(model, inputs, new=new, **how)[0], expected)
        checked(state, new)


def test_an_end_within_a_draft_and_criteria_of_any_kind():
    model = exact(MODELS["llama"])
    inputs = MODELS["llama"].prompt(model)
    dense = text(model, inputs, new=16)[0]
    for place in range(2, 7):
        end = int(dense[0, 9 + place])
        expected = text(model, inputs, new=16, eos_token_id=end)[0]
        lengths = []

        def seen(ids, scores, lengths=lengths, at=9 + place, **kwargs):
            lengths.append(ids.shape[1])
            return torch.tensor([ids.shape[1] == at])

        with popmm.pruned(model, lossless=True, draft_tokens=4):
            assert torch.equal(text(model, inputs, new=16, eos_token_id=end)[0], expected)
            assert torch.equal(text(model, inputs, new=16, stopping_criteria=[seen])[0], dense[:, : 9 + place])
        assert lengths == list(range(10, 10 + place))  # each prefix of the text once, and nothing that was only drafted


class Listener:
    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, value):
        self.heard.append(value.tolist())

    def end(self):
        self.ended = True


def test_streamers_scores_and_the_cache_are_those_of_plain_decoding():
    model = exact(MODELS["llama"])
    inputs = MODELS["llama"].prompt(model)
    how = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, **SAMPLED)
    outputs, listeners = [], []
    for settings in (None, dict(lossless=True, draft_tokens=4)):
        listener = Listener()
        torch.manual_seed(1)
        if settings is None:
            outputs.append(model.generate(**inputs, max_new_tokens=10, streamer=listener, **how))
        else:
            with popmm.pruned(model, **settings):
                outputs.append(model.generate(**inputs, max_new_tokens=10, streamer=listener, **how))
        listeners.append(listener)
    dense, ours = outputs
    assert type(dense) is type(ours) and dense.keys() == ours.keys()
    assert listeners[0].heard == listeners[1].heard and listeners[1].ended
    assert len(ours.scores) == len(ours.logits) == 10
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.cat(getattr(ours, name)), torch.cat(getattr(dense, name)), rtol=0, atol=1e-6)
    caches = [compat.cache_of(output) for output in outputs]
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 18
    torch.testing.assert_close(caches[0].layers[0].keys, caches[1].layers[0].keys)


def test_chat_turns_on_a_kept_cache():
    model = exact(MODELS["llama"])
    first, second = tiny.prompt(9), tiny.prompt(5, seed=2)

    def talk():
        out = model.generate(first, max_new_tokens=7, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, second], dim=-1)
        again = compat.cache_argument(model, compat.cache_of(out))
        return model.generate(ids, max_new_tokens=9, do_sample=False, **again)

    expected = talk()
    with popmm.pruned(model, lossless=True, draft_tokens=3) as state:
        assert torch.equal(talk(), expected)
        assert state.passes["prompt"] == 2
        assert len(state.layers) and state.passes.drafted > 0


def test_verification_leaves_the_partition_as_it_is():
    model = MODELS["llama"].build()
    with popmm.pruned(model, lossless=True, draft_tokens=3) as state:
        text(model, {"input_ids": tiny.prompt(9)}, new=1)
        before = {name: partition.importance.clone() for name, partition in state.layers.items()}
        text(model, {"input_ids": tiny.prompt(9)}, new=12)
        assert all(torch.equal(state.layers[name].importance, before[name]) for name in before)


def test_what_is_no_single_sequence_is_dense_and_says_so():
    model = exact(MODELS["llama"])
    one = {"input_ids": tiny.prompt(9)}
    two = {"input_ids": tiny.prompt(9, batch=2), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    ways = {
        "a batch of 2": (two, {}),
        "num_beams=3": (one, dict(num_beams=3)),
        "a batch of 3": (one, dict(do_sample=True, num_return_sequences=3)),
        "use_cache=False": (one, dict(use_cache=False)),
    }
    expected = {why: text(model, inputs, **how)[0] for why, (inputs, how) in ways.items()}
    with popmm.pruned(model, lossless=True, draft_tokens=3) as state:
        for why, (inputs, how) in ways.items():
            with (
                pytest.warns(popmm.runtime.passes.NotPrunedWarning, match=why)
                if "cache" not in why
                else (pytest.warns(popmm.runtime.passes.NotPrunedWarning))
            ):
                found = text(model, inputs, **how)[0]
            assert torch.equal(found, expected[why])
        assert state.passes["decode"] == state.passes["verify"] == 0


def test_steps_outside_generate_are_dense():
    model = MODELS["llama"].build()
    ids = tiny.prompt(9)
    with torch.no_grad():
        expected = model(ids)
        step = model(ids[:, :1], **compat.cache_argument(model, compat.cache_of(expected))).logits
        with popmm.pruned(model, lossless=True) as state:
            out = model(ids)
            with warnings.catch_warnings(record=True) as said:
                found = model(ids[:, :1], **compat.cache_argument(model, compat.cache_of(out))).logits
            assert torch.equal(found, step) and any("lossless" in str(w.message) for w in said)
            assert dict(state.passes) == {"prompt": 1, "decode": 0, "dense": 1}


def test_assisted_generation_verifies_and_never_partitions_anew():
    model = exact(MODELS["llama"])
    ids = torch.cat([tiny.prompt(6)] * 3, dim=-1)
    for lossless in (False, True):
        with popmm.pruned(model, ffn_ratio=0.4, lossless=lossless) as state:
            how = dict(prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
            model.generate(ids, max_new_tokens=24, do_sample=False, **how)
            assert state.passes["prompt"] == 1
            assert state.passes["verify"] > 0


@pytest.mark.parametrize("at", [2, 4, 6])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_interrupted_within_a_round(at, kind):
    model = exact(MODELS["llama"])
    inputs = MODELS["llama"].prompt(model)
    expected = text(model, inputs)[0]
    calls = 0

    def processor(ids, scores):
        nonlocal calls
        calls += 1
        if calls == at:
            raise kind("stop")
        return scores

    before = {name: p.clone() for name, p in model.named_parameters()}
    state = popmm.attach(model, lossless=True, draft_tokens=3)
    with pytest.raises(kind):
        text(model, inputs, logits_processor=[processor])
    assert torch.equal(text(model, inputs)[0], expected)
    popmm.detach(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert torch.equal(text(model, inputs)[0], expected)
    assert state.passes.accepted > 0


def test_a_padded_prompt():
    model = exact(MODELS["llama"])
    inputs = {"input_ids": tiny.prompt(9), "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])}
    expected = text(model, inputs)[0]
    with popmm.pruned(model, lossless=True, draft_tokens=3) as state:
        for how in ({}, dict(cache_implementation="static")):
            assert torch.equal(text(model, inputs, **how)[0], expected)
        assert state.passes.drafted > 0


@pytest.mark.parametrize(
    "settings, told",
    [
        (dict(lossless=1), "True or False"),
        (dict(draft_tokens=4), "belongs to lossless"),
        (dict(lossless=True, draft_tokens=0), "1 to 16"),
        (dict(lossless=True, draft_tokens=2.5), "1 to 16"),
        (dict(lossless=True, weights="replace"), "whole model"),
        (dict(lossless=True, refresh_every=8), "whole model"),
        (dict(lossless=True, selection="mask", prefill="pruned"), "whole model"),
        (dict(lossless=True, vision="prune"), "whole model"),
    ],
)
def test_bad_settings(settings, told):
    with pytest.raises(ValueError, match=told):
        popmm.PopConfig(**settings)


def test_defaults_of_drafts():
    assert (popmm.PopConfig().rest_bits, popmm.PopConfig().lossless) == (16, False)
    drafts = popmm.PopConfig(lossless=True)
    assert (drafts.selection, drafts.bytes, drafts.rest_bits) == ("tiers", 0.25, 8)
    assert popmm.PopConfig(lossless=True, rest_bits=16).rest_bits == 16
    back = drafts.replace(lossless=False)
    assert (back.bytes, back.rest_bits) == (0.33, 16)
    assert popmm.PopConfig().replace(lossless=True) == drafts
    assert popmm.PopConfig(bytes=0.3).replace(lossless=True).bytes == 0.3


def test_float32_differs_at_near_ties_alone():
    """Of a pass of several tokens the rounding is another; where texts part, the two best tokens are that near."""
    case = MODELS["llama"]
    model = case.build(torch.float32)
    for seed in range(8):
        inputs = case.prompt(model, seed=seed)
        expected, logits = generate(model, inputs, new=24)
        with popmm.pruned(model, lossless=True, draft_tokens=4):
            found, _ = generate(model, inputs, new=24)
        parts = (found != expected)[0].nonzero()
        if len(parts):
            best = logits[int(parts[0]), 0].topk(2).values
            assert float(best[0] - best[1]) < 1e-4


def test_a_warning_points_at_the_callers_line():
    model = MODELS["llama"].build()
    with popmm.pruned(model, lossless=True):
        with pytest.warns(popmm.runtime.passes.NotPrunedWarning) as said:
            text(model, {"input_ids": tiny.prompt(9)}, num_beams=2)
    assert said[0].filename == __file__


def test_a_misspelt_setting_gets_a_hint():
    model = MODELS["llama"].build()
    with pytest.raises(TypeError, match="did you mean lossless"):
        popmm.attach(model, losless=True)
    with pytest.raises(TypeError, match="there are pruning_ratio"):
        popmm.attach(model, quux=True)

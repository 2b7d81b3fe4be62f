"""Where lossless decoding could leave the dense model's text, or a cache, a generator or a call in another state."""

import pytest
import tiny
import torch
from matrix import MODELS
from transformers import DynamicCache, StaticCache, SynthIDTextWatermarkingConfig

import popmm
from popmm import compat, zoo

GREEDY = dict(do_sample=False, max_new_tokens=12)


def exact(name: str):
    model = MODELS[name].build(torch.float64)
    model.set_experts_implementation("eager")
    return model


def sliding(window: int, kinds: tuple[str, ...]):
    settings = dict(sliding_window=window, layer_types=[f"{kind}_attention" for kind in kinds])
    return tiny.from_name("gemma3_text", **tiny.COMMON, head_dim=8, **settings).to(torch.float64)


def test_stop_strings_and_their_tokenizer():
    model, tokenizer = zoo.load("stories")
    inputs = tokenizer("Once upon a time there was", return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    how = dict(do_sample=False, max_new_tokens=60, stop_strings=["."], tokenizer=tokenizer)
    expected = model.generate(**inputs, **how)
    assert expected.shape[1] < inputs["input_ids"].shape[1] + 60
    with popmm.pruned(model, lossless=True, draft_tokens=4):
        assert torch.equal(model.generate(**inputs, **how), expected)


class Recorder:
    def __init__(self, stop_after: int | None = None):
        self.heard, self.stop_after, self.ended = [], stop_after, False

    def put(self, value):
        self.heard += value.flatten().tolist()
        if self.stop_after is not None and len(self.heard) >= self.stop_after:
            raise KeyboardInterrupt

    def end(self):
        self.ended = True


def test_arguments_by_position():
    model, ids = exact("llama"), tiny.prompt(9)
    expected = model.generate(ids, **GREEDY)
    with popmm.pruned(model, lossless=True, draft_tokens=3) as state:
        streamer = Recorder()
        config = model.generation_config
        found = model.generate(ids, config, None, None, None, None, None, streamer, None, None, None, **GREEDY)
        assert torch.equal(found, expected) and streamer.heard == expected[0].tolist() and streamer.ended
        assert state.passes.drafted > 0
        with pytest.warns(popmm.runtime.passes.NotPrunedWarning, match="assistant"):
            found = model.generate(ids, config, None, None, None, None, exact("llama"), **GREEDY)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kinds", [("sliding", "sliding"), ("sliding", "full")])
@pytest.mark.parametrize("window", [8, 64])
def test_static_caches_of_sliding_models(kinds, window):
    model, ids = sliding(window, kinds), tiny.prompt(9)
    how = dict(do_sample=False, max_new_tokens=80, cache_implementation="static")
    expected = model.generate(ids, **how)
    two = tiny.prompt(9, batch=2)
    both = model.generate(two, attention_mask=torch.ones_like(two), **how)
    with popmm.pruned(model, lossless=True, draft_tokens=3) as state:
        assert torch.equal(model.generate(ids, **how), expected) and state.passes.drafted > 0
        with pytest.warns(popmm.runtime.passes.NotPrunedWarning, match="batch of 2"):
            assert torch.equal(model.generate(two, attention_mask=torch.ones_like(two), **how), both)


def test_a_static_cache_of_ones_own():
    for model, drafts in ((exact("llama"), True), (sliding(8, ("sliding", "full")), False)):
        ids, how = tiny.prompt(9), dict(do_sample=False, max_new_tokens=30)

        def own(model=model):
            return compat.cache_argument(model, StaticCache(config=model.config, max_cache_len=40))

        expected = model.generate(ids, **how, **own())
        with popmm.pruned(model, lossless=True, draft_tokens=3) as state:
            assert torch.equal(model.generate(ids, **how, **own()), expected)
            assert (state.passes.drafted > 0) == drafts


@pytest.mark.parametrize("at", range(11, 18))
@pytest.mark.parametrize("form", ["llama", "sliding"])
def test_a_streamer_that_stops_leaves_the_cache_at_the_text(at, form):
    model = exact("llama") if form == "llama" else sliding(6, ("sliding", "full"))
    ids = tiny.prompt(9)
    plain = model.generate(ids, do_sample=False, max_new_tokens=at - 9 + 5)
    with popmm.pruned(model, lossless=True, draft_tokens=4):
        cache, streamer = DynamicCache(config=model.config), Recorder(stop_after=at)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, **GREEDY, streamer=streamer, **compat.cache_argument(model, cache))
        assert cache.get_seq_length() == at - 1
        assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
        heard = torch.tensor([streamer.heard])
        found = model.generate(heard, do_sample=False, max_new_tokens=5, **compat.cache_argument(model, cache))
        assert torch.equal(found, plain)


def test_an_interrupt_gives_back_what_was_drawn_ahead():
    model, ids = exact("llama"), tiny.prompt(9)
    how = dict(do_sample=True, max_new_tokens=12)
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, streamer=Recorder(stop_after=14), **how)
    expected = torch.rand(1)
    with popmm.pruned(model, lossless=True, draft_tokens=4):
        torch.manual_seed(0)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, streamer=Recorder(stop_after=14), **how)
        # of the token at which it stopped the noise was used
        assert torch.equal(torch.rand(1), expected)


class Drawing(Recorder):
    """Draws from the process's generator too."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def put(self, value):
        super().put(value)
        self.drawn.append(float(torch.rand(1)))


def test_numbers_that_others_draw_do_not_come_again():
    model, ids = exact("llama"), tiny.prompt(9)
    with popmm.pruned(model, lossless=True, draft_tokens=4):
        for seed in range(3):
            torch.manual_seed(seed)
            streamer = Drawing()
            model.generate(ids, do_sample=True, max_new_tokens=9, streamer=streamer)
            after = torch.rand(8).tolist()
            assert not set(after) & set(streamer.drawn)


def test_processors_see_no_text_beyond_its_end():
    model, ids = exact("llama"), tiny.prompt(9)
    end = int(model.generate(ids, **GREEDY)[0, 12])

    def allowed(batch, text):
        return [] if end in text[9:].tolist() else list(range(tiny.VOCAB))

    how = dict(GREEDY, eos_token_id=end, prefix_allowed_tokens_fn=allowed)
    expected = model.generate(ids, **how)
    with popmm.pruned(model, lossless=True, draft_tokens=4):
        assert torch.equal(model.generate(ids, **how), expected)


def test_watermarks_are_decoded_densely():
    model, ids = exact("llama"), tiny.prompt(9)
    mark = SynthIDTextWatermarkingConfig(keys=[654, 400, 836, 123], ngram_len=3)
    how = dict(do_sample=True, max_new_tokens=12, watermarking_config=mark)
    torch.manual_seed(1)
    expected = model.generate(ids, **how)
    with popmm.pruned(model, lossless=True, draft_tokens=4):
        torch.manual_seed(1)
        with pytest.warns(popmm.runtime.passes.NotPrunedWarning, match="watermarking_config"):
            assert torch.equal(model.generate(ids, **how), expected)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("drafted", [2, 3, 5])
def test_positions_that_turn_by_the_length_of_the_text(kind, drafted):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        half = tiny.COMMON["hidden_size"] // tiny.COMMON["num_attention_heads"] // 2
        rope |= dict(short_factor=[1.0] * half, long_factor=[4.0] * half, original_max_position_embeddings=16)
    model = tiny.from_name("llama", **{**tiny.COMMON, "max_position_embeddings": 64 if kind == "longrope" else 16},
                           rope_parameters=rope).to(torch.float64)  # fmt: skip
    for seed in range(4):
        ids = tiny.prompt(9, seed=seed)
        expected = model.generate(ids, do_sample=False, max_new_tokens=16)
        with popmm.pruned(model, lossless=True, draft_tokens=drafted) as state:
            assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=16), expected)
            assert state.passes.drafted > 0 and state.passes["prompt"] == 1


def test_a_draft_model_of_somebody_else():
    big, small, ids = sliding(6, ("sliding", "full")), sliding(6, ("sliding", "full")), tiny.prompt(9)
    expected = big.generate(ids, **GREEDY)
    with popmm.pruned(small, lossless=True, draft_tokens=3):
        assert torch.equal(big.generate(ids, assistant_model=small, **GREEDY), expected)


def test_nothing_stays_recorded_where_nothing_is_drafted():
    model, ids = sliding(6, ("sliding", "full")), tiny.prompt(9)
    with popmm.pruned(model, lossless=True, ffn_ratio=0.0):
        cache = DynamicCache(config=model.config)
        with pytest.warns(popmm.runtime.passes.NotPrunedWarning, match="nothing is pruned"):
            model.generate(ids, do_sample=False, max_new_tokens=30, **compat.cache_argument(model, cache))
    assert cache.layers[0].keys.shape[-2] < 9
    assert not any(getattr(layer, "record_past", False) for layer in cache.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_while_attached(dtype):
    model, ids = MODELS["llama"].build(torch.bfloat16), tiny.prompt(9)
    with popmm.pruned(model, lossless=True, draft_tokens=3) as state:
        model.to(dtype)
        model.generate(ids, **GREEDY)
        assert state.passes["verify"] > 0


def test_scores_that_are_no_numbers():
    model, ids = exact("llama"), tiny.prompt(9)

    def broken(ids, scores):
        return scores * float("nan") if ids.shape[1] > 11 else scores

    with popmm.pruned(model, lossless=True, draft_tokens=3), pytest.raises(RuntimeError, match="probability tensor"):
        model.generate(ids, do_sample=True, max_new_tokens=8, logits_processor=[broken])


def test_cross_attention_to_pictures():
    from test_unseen_sites import mllama

    model, ids = mllama().to(torch.float64), tiny.prompt(9)
    expected = model.generate(input_ids=ids, **GREEDY)
    with popmm.pruned(model, lossless=True, draft_tokens=3):
        assert torch.equal(model.generate(input_ids=ids, **GREEDY), expected)


def test_rows_of_the_bench_count_tokens_and_not_calls():
    from popmm.runtime.clock import Clock

    clock = Clock(None)
    for tokens in ([1, 2, 3], [4], [5, 6, 7], [8]):
        clock.put(torch.tensor([tokens]))
    assert clock.counts == [3, 1, 3, 1]

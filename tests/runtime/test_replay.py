"""A compiled step is recorded once and run again as a program, if that computes the same, bit for bit."""

import gc
import weakref

import pytest
import tiny
import torch
from matrix import MODELS, generate

import popmm
from popmm.compat import compiled_anywhere
from popmm.kernels import operators
from popmm.runtime import recorded, replay, wrappers

pytestmark = pytest.mark.skipif(not operators.available(), reason="no C++ compiler")
FAMILIES = ["llama", "qwen2-moe", "gpt2"]  # dense, experts, no gate
SETTINGS = [dict(bytes=0.3, rest_bits=8), dict(bytes=0.3), dict(bytes=1), dict(weight_bits=6)]


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that are compiled to be replayed, as they come."""
    made = []
    own = replay.Replayed.__init__

    def noted(self, *args):
        own(self, *args)
        made.append(self)

    monkeypatch.setattr(replay.Replayed, "__init__", noted)
    monkeypatch.setattr(wrappers, "LARGE", 0)
    torch._dynamo.reset()
    return made


def compiled(function):
    return torch.compile(function, backend=replay.replayed_inductor, dynamic=False)


@torch.no_grad()
def run(function, *args, times=6):
    """Results of so many calls, with inputs at new places each."""
    return [function(*(a.clone() + i if isinstance(a, torch.Tensor) else a for a in args)) for i in range(times)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_replayed_steps_are_the_compiled_ones(name, settings, graphs, monkeypatch):
    prompts = [{"input_ids": tiny.prompt(n, seed=n)} for n in (9, 14, 14)]
    found = {}
    for on in ("0", "1"):
        monkeypatch.setenv("POPMM_REPLAY", on)
        torch._dynamo.reset()
        model = MODELS[name].build()
        with popmm.pruned(model, **settings) as state:
            found[on] = [
                generate(model, inputs, new=9, cache_implementation="static", compile_config=compiled_anywhere())
                for inputs in prompts
            ]
            assert state.passes["dense"] == 0
    for (ids, logits), (own_ids, own_logits) in zip(found["0"], found["1"]):
        assert torch.equal(ids, own_ids) and torch.equal(logits, own_logits)
    assert [g.replays > 12 for g in graphs] == [True]


def test_one_recording_serves_prompt_after_prompt_and_batches_have_their_own(graphs):
    model = MODELS["llama"].build()
    with popmm.pruned(model, bytes=0.3, rest_bits=8):
        for n in (5, 9, 14, 21):
            generate(model, {"input_ids": tiny.prompt(n, seed=n)}, new=8, cache_implementation="static")
        (alone,) = graphs
        assert alone.replays == 4 * 7 - 3 - len(alone._stay and [0])
        generate(model, {"input_ids": tiny.prompt(5).expand(2, -1)}, new=8, cache_implementation="static")
        assert len(graphs) == 2 and graphs[1].replays > 0


def test_windows_that_never_slide_are_replayed_and_others_not(graphs):
    model = MODELS["gemma3"].build()
    with popmm.pruned(model, bytes=0.3, rest_bits=8):
        generate(model, {"input_ids": tiny.prompt(9)}, new=8, cache_implementation="static")
    assert not any(g.replays for g in graphs)
    graphs.clear()
    model.config.get_text_config().sliding_window = 300
    for module in model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 300
    with popmm.pruned(model, bytes=0.3, rest_bits=8):
        expected, _ = generate(model, {"input_ids": tiny.prompt(9)}, new=8)
        found, _ = generate(model, {"input_ids": tiny.prompt(9)}, new=8, cache_implementation="static")
    assert torch.equal(found, expected) and [g.replays > 0 for g in graphs] == [True]


def test_lossless_passes_are_replayed(graphs):
    model = MODELS["llama"].build()
    inputs = {"input_ids": tiny.prompt(9)}
    expected = generate(model, inputs, new=24)[0]
    with popmm.pruned(model, lossless=True):
        for _ in range(2):
            ids, _ = generate(model, inputs, new=24, cache_implementation="static")
            assert torch.equal(ids, expected)
    assert any(g.replays for g in graphs)


def test_a_detached_model_can_be_freed(graphs):
    model = MODELS["llama"].build()
    with popmm.pruned(model, bytes=0.3, rest_bits=8) as state:
        generate(model, {"input_ids": tiny.prompt(9)}, new=8, cache_implementation="static")
    assert graphs[0].replays
    held = weakref.ref(model), weakref.ref(state)
    del model, state
    gc.collect()
    assert [own() for own in held] == [None, None]


def test_attaching_again_and_again_is_compiled_each_time(graphs):
    model = MODELS["llama"].build()
    for _ in range(10):
        with popmm.pruned(model, bytes=0.3, rest_bits=8):
            generate(model, {"input_ids": tiny.prompt(9)}, new=6, cache_implementation="static")
    assert len(graphs) == 10 and all(g.replays for g in graphs)


def test_products_of_torch_are_replayed_between_kernels():
    weight = torch.randn(300, 300)

    def step(x):
        return (x.sin() @ weight).cos() + 1

    made = compiled(step)
    for found, expected in zip(run(made, torch.randn(4, 300)), run(step, torch.randn(4, 300))):
        assert found.shape == expected.shape
    x = torch.randn(4, 300)
    with torch.no_grad():
        torch.testing.assert_close(made(x), step(x))


def test_what_a_step_writes_is_written_once_a_call():
    state, big = torch.zeros(3), torch.zeros(recorded.COPIED // 4 + 1)

    def step(x, state, big):
        state.add_(x)
        big[:3].add_(2 * x)
        return state * 2

    made = compiled(step)
    with torch.no_grad():
        for i in range(1, 9):
            assert torch.equal(made(torch.ones(3), state, big), torch.full((3,), 2.0 * i))
            assert torch.equal(state, torch.full((3,), float(i))) and torch.equal(big[:3], 2 * state)


def test_results_stay_when_the_next_step_runs():
    made = compiled(lambda x: x * 2)
    first, *others = run(made, torch.ones(5))
    assert torch.equal(first, torch.full((5,), 2.0)) and torch.equal(others[-1], torch.full((5,), 12.0))
    assert len({r.data_ptr() for r in (first, *others)}) == 6


def test_inputs_that_come_back_are_the_callers_own():
    made = compiled(lambda x: (x, x + 1))
    with torch.no_grad():
        for i in range(5):
            x = torch.full((3,), float(i))
            same, more = made(x)
            assert same is x and torch.equal(more, x + 1)


def test_random_numbers_are_drawn_anew(graphs):
    made = compiled(lambda x: x + torch.rand_like(x))
    found = run(made, torch.zeros(50))
    assert len({tuple((r - i).tolist()) for i, r in enumerate(found)}) == 6


def test_large_inputs_at_new_places_are_recorded_again_and_then_left_alone(graphs):
    made = compiled(lambda x: x * 2)
    for n in range(12):
        x = torch.full((recorded.COPIED,), float(n))
        with torch.no_grad():
            assert torch.equal(made(x), 2 * x)
        keep = x  # noqa: F841  the next one lies elsewhere
    (graph,) = graphs
    assert graph.replays == 0 and graph._left == 0


def test_gradients_are_never_replayed(graphs):
    made = compiled(lambda x: (x * x).sum())
    x = torch.ones(4, requires_grad=True)
    run(made, x.detach())
    made(x).backward()
    assert torch.equal(x.grad, torch.full((4,), 2.0))


def test_a_recording_that_computes_otherwise_is_dropped(graphs, monkeypatch, caplog):
    def forgets(self, function, arguments, written):
        self.program.calls += 1

    monkeypatch.setattr(recorded.Recorded, "kernel", forgets)
    made = compiled(lambda x: x * 2)
    for i, found in enumerate(run(made, torch.ones(5))):
        assert torch.equal(found, torch.full((5,), 2.0 * (1 + i)))
    assert graphs[0].replays == 0 and "different results" in caplog.text

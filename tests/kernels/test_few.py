"""A linear layer of a few vectors, each weight read once: what decode steps and checks of drafts read as it is."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

import popmm
from popmm import kernels
from popmm.kernels import FEW_TOKENS, operators
from popmm.runtime.few import served

pytestmark = pytest.mark.skipif(not operators.available(), reason="no C++ compiler")
NEXT = torch.tensor([[5]])
LOGITS = dict(return_dict_in_generate=True, output_logits=True)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize(
    "n_rows, d", [(1, 32), (3, 64), (16, 96), (67, 576), (130, 1536), (37, 4128), (18, 1), (21, 47), (5, 2079)]
)
@pytest.mark.parametrize("n", [*range(1, 10), FEW_TOKENS])
def test_products_are_those_of_float32_rounded_once(n_rows, d, n):
    weight, bias, x = drawn(n_rows, d), drawn(n_rows, seed=1), drawn(n, d, seed=2)
    for own in (None, bias):
        exact = F.linear(x.float(), weight.float(), None if own is None else own.float())
        found = operators.few_linear(x, weight, own)
        assert found.dtype == torch.bfloat16 and found.shape == (n, n_rows)
        torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=1e-3 * d**0.5)
    plain = operators.few_linear(x, weight, None)
    assert torch.equal(operators.few_linear(x.view(1, n, d), weight, None)[0], plain)
    beside = torch.full((n_rows, d + 40), torch.nan).bfloat16()
    beside[:, 3 : d + 3] = weight
    assert torch.equal(operators.few_linear(x, beside[:, 3 : d + 3], None), plain)


@pytest.mark.parametrize("d", [77, 128, 4128])
def test_a_token_does_not_depend_on_those_beside_it(d):
    """One that checks alone and one among others choose alike."""
    weight, x = drawn(96, d), drawn(FEW_TOKENS, d, seed=1)
    together = operators.few_linear(x, weight, None)
    assert all(torch.equal(operators.few_linear(x[i : i + 1], weight, None)[0], together[i]) for i in range(len(x)))


@pytest.mark.parametrize(
    "x, weight, bias",
    [
        (drawn(2, 64).float(), drawn(8, 64), None),
        (drawn(2, 64), drawn(8, 32), None),
        (drawn(2, 64), drawn(8, 64).T, None),
        (drawn(2, 64), drawn(8, 128)[:, ::2], None),
        (drawn(2, 64), drawn(8, 64), drawn(7)),
        (drawn(2, 64), drawn(8, 64), drawn(8).float()),
    ],
)
def test_other_tensors_are_refused(x, weight, bias):
    with pytest.raises(RuntimeError, match="few_linear"):
        operators.few_linear(x, weight, bias)


def test_which_layers_are_served():
    plain = nn.Linear(64, 32).bfloat16()
    assert served(plain)
    assert not served(nn.Linear(64, 32)) and not served(nn.Linear(64, 8).bfloat16())
    plain.forward = plain.forward
    assert not served(plain)


def test_bfloat16_checks_by_the_kernel_and_prompts_by_torch(monkeypatch):
    model, calls = tiny.dense("llama").to(torch.bfloat16), []
    kernel = operators.few_linear
    monkeypatch.setattr(operators, "few_linear", lambda x, *rest: calls.append(x.shape) or kernel(x, *rest))
    with popmm.pruned(model, lossless=True, draft_tokens=3) as state:
        model.generate(tiny.prompt(9), max_new_tokens=8, do_sample=False)
        assert state.passes["verify"] > 0
    assert calls and all(shape[:-1].numel() <= 4 for shape in calls)
    before = len(calls)
    model.generate(tiny.prompt(9), max_new_tokens=8, do_sample=False)
    assert len(calls) == before


@pytest.mark.parametrize(
    "settings, of_ffn",
    [
        (dict(bytes=0.3), 0),
        (dict(ffn_ratio=0.3, selection="mask"), 3),
        (dict(ffn_ratio=0.3, selection="keep"), 3),
        (dict(ffn_ratio=0.3, selection="gate", gate_bits=16), 1),
    ],
)
def test_steps_read_what_is_in_16_bits_by_the_kernel(monkeypatch, settings, of_ffn):
    model, calls = tiny.dense("llama").to(torch.bfloat16), []
    kernel = operators.few_linear
    monkeypatch.setattr(
        operators, "few_linear", lambda x, *rest: calls.append(x.shape[:-1].numel()) or kernel(x, *rest)
    )
    layers = (4 + of_ffn) * len(model.model.layers) + 1  # with the output layer
    with popmm.pruned(model, **settings):
        model.generate(tiny.prompt(9), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert calls == [1] * 3 * layers


@pytest.mark.parametrize("settings", [dict(bytes=1), dict(ffn_ratio=0.0)], ids=str)
def test_without_pruning_nothing_rounds_otherwise(monkeypatch, settings):
    model = tiny.dense("llama").to(torch.bfloat16)
    expected = model.generate(tiny.prompt(9), max_new_tokens=4, do_sample=False, **LOGITS).logits
    monkeypatch.setattr(operators, "few_linear", None)
    monkeypatch.setattr(operators, "attend", None)
    with popmm.pruned(model, **settings):
        found = model.generate(tiny.prompt(9), max_new_tokens=4, do_sample=False, **LOGITS).logits
    assert all(map(torch.equal, found, expected))


def test_dense_passes_of_an_attached_model_are_its_own():
    """Of one token by a cache that popmm has not read, and prompts that come token by token."""
    model = tiny.dense("llama").to(torch.bfloat16)
    with torch.no_grad():
        cache = model(tiny.prompt(20)).past_key_values
        expected = model(NEXT, past_key_values=copy.deepcopy(cache)).logits
        with popmm.pruned(model, bytes=0.3) as state:
            assert torch.equal(model(NEXT, past_key_values=cache).logits, expected)
            assert state.passes["dense"] == 1
            # one that shares the configuration, and is not attached
            other = type(model)(model.config).eval().to(torch.bfloat16)
            other.load_state_dict(model.state_dict())
            cache = other(tiny.prompt(20)).past_key_values
            assert torch.equal(other(NEXT, past_key_values=cache).logits, expected)


def test_a_bias_keeps_its_gradient():
    x, weight, bias = drawn(2, 64), drawn(32, 64), drawn(32).requires_grad_()
    assert kernels.linear(x, weight, bias).requires_grad
    kernels.linear(x, weight, bias).sum().backward()
    assert bias.grad.eq(2).all()


def test_autocast_decides_the_dtype():
    model = tiny.dense("llama").to(torch.bfloat16)
    with popmm.pruned(model, bytes=0.3) as state, torch.autocast("cpu", dtype=torch.float16):
        model.generate(tiny.prompt(9), max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert state.passes["decode"] == 3
        assert kernels.linear(drawn(1, 64), drawn(32, 64)).dtype == torch.float16


def test_weights_that_compute_otherwise_are_left_to_torch():
    class Other(torch.Tensor):
        pass

    assert operators.serves_few(drawn(32, 64), None)
    assert not operators.serves_few(drawn(32, 64).as_subclass(Other), None)
    assert not operators.serves_few(drawn(32, 64), drawn(1))
    assert not operators.serves_few(drawn(1, 64).expand(8, 64), None)
    with pytest.raises(RuntimeError, match=r"as many numbers \(64\)"):
        operators.few_linear(drawn(2, 64), drawn(1, 64).expand(8, 64), None)


def test_a_layer_of_an_attached_model_is_not_copied():
    model = tiny.dense("llama").to(torch.bfloat16)
    with popmm.pruned(model, bytes=0.3), pytest.raises(RuntimeError, match="detach"):
        copy.deepcopy(model.lm_head)
    assert copy.deepcopy(model.lm_head) is not model.lm_head


@pytest.mark.parametrize("settings", [dict(bytes=0.3), dict(lossless=True, draft_tokens=3)], ids=str)
def test_steps_and_checks_attend_by_the_kernel(monkeypatch, settings):
    model, calls = tiny.dense("llama").to(torch.bfloat16), []
    own = operators.attend
    monkeypatch.setattr(operators, "attend", lambda q, *rest: calls.append(q.shape[2]) or own(q, *rest))
    with popmm.pruned(model, **settings):
        model.generate(tiny.prompt(9), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert max(calls) == (4 if "lossless" in settings else 1) and 1 in calls


def test_headless_decoders_compile_in_one_graph():
    """Nobody has asked for the operators before: in a process of its own."""
    code = """if 1:
        import sys; sys.path.insert(0, "tests")
        import popmm, tiny, torch
        model = tiny.dense("gpt2").to(torch.bfloat16).transformer
        popmm.attach(model, ffn_ratio=0.3, selection="mask")
        with torch.no_grad():
            cache = model(tiny.prompt(9), use_cache=True).past_key_values
            torch.compile(model, fullgraph=True, backend="eager")(torch.tensor([[5]]), past_key_values=cache)
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])

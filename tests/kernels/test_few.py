"""A linear layer of a few vectors, each weight read once: what decode steps and checks of drafts read as it is."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

import popmm
from popmm.kernels import FEW_TOKENS, operators
from popmm.runtime.few import served

pytestmark = pytest.mark.skipif(not operators.available(), reason="no C++ compiler")
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


@pytest.mark.parametrize("settings, of_ffn", [(dict(bytes=0.3), 0), (dict(ffn_ratio=0.3, selection="mask"), 3)])
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

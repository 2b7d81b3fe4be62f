"""Weights and layers that somebody changes while the model is attached: seen at the next prompt, or refused."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

import popmm

WAYS = {
    "mask-copy": dict(selection="mask", layout="copy"),
    "keep-copy": dict(selection="keep", layout="copy"),
    "mask-permute": dict(selection="mask", layout="permute"),
    "gate16": dict(selection="gate", gate_bits=16, layout="copy"),
    "gate8": dict(selection="gate", gate_bits=8, layout="copy"),
    "gate4-permute": dict(selection="gate", gate_bits=4, layout="permute"),
}


def _tokens(model):
    with torch.no_grad():
        out = model(tiny.prompt(9, seed=3))
        step = model(tiny.prompt(1, seed=4), **popmm.compat.cache_argument(model, popmm.compat.cache_of(out)))
    return torch.cat([out.logits[0], step.logits[0]])


def _scale(model):
    model.model.layers[0].mlp.down_proj.weight.data.mul_(0.5)


def _one_row(model):
    model.model.layers[1].mlp.gate_proj.weight.data[7] *= -1


def _one_element(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 0.5


def _sync(model):
    """New weights near the old ones, as a trainer sends them, in the model's own order."""
    generator = torch.Generator().manual_seed(5)
    for name, weight in _original(model).items():
        noise = torch.randn(weight.shape, generator=generator) * 0.02
        model.get_parameter(name).data.copy_(weight + noise)


def _sync_down(model):
    name = "model.layers.0.mlp.down_proj.weight"
    model.get_parameter(name).data.copy_(_original(model)[name] * 1.05)


def _equal_norms(model):
    """Other weights whose rows (columns of down) have the same norms."""
    for name, weight in _original(model).items():
        if "mlp" in name:
            dim = 0 if "down" in name else 1
            other = weight.flip(dim)
            model.get_parameter(name).data.copy_(other)


CHANGES = {"scale": _scale, "row": _one_row, "element": _one_element}
LOADS = {"sync": _sync, "sync-down": _sync_down, "equal-norms": _equal_norms}
_originals: dict[int, dict] = {}


def _original(model):
    return _originals[id(model)]


@pytest.fixture
def model():
    model = tiny.dense("llama")
    _originals[id(model)] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return model


# an index in permuted weights is another channel
PAIRS = [(w, c) for w in WAYS for c in [*CHANGES, *LOADS] if not (w == "mask-permute" and c in ("row", "element"))]


@pytest.mark.parametrize(("way", "change"), PAIRS)
def test_writes_through_data_are_seen_by_the_next_prompt(model, way, change):
    write = {**CHANGES, **LOADS}[change]
    config = popmm.PopConfig(ffn_ratio=0.4, **WAYS[way])
    fresh = tiny.dense("llama")
    _originals[id(fresh)] = _original(model)
    write(fresh)
    dense = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    with popmm.pruned(fresh, config):
        expected = _tokens(fresh)
    with popmm.pruned(model, config):
        model.generate(tiny.prompt(12), max_new_tokens=3, do_sample=False)
        write(model)
        torch.testing.assert_close(_tokens(model), expected, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dense[name]), name


@pytest.mark.parametrize("load", LOADS)
def test_weights_loaded_while_permuted_stay_as_they_were_loaded(model, load):
    """No prompt in between: detach alone must find out."""
    with popmm.pruned(model, ffn_ratio=0.4, selection="mask", layout="permute"):
        model.generate(tiny.prompt(12), max_new_tokens=3, do_sample=False)
        LOADS[load](model)
    fresh = tiny.dense("llama")
    _originals[id(fresh)] = _original(model)
    LOADS[load](fresh)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, fresh.get_parameter(name)), name


@pytest.mark.parametrize("layout", ["copy", "permute"])
def test_experts_loaded_while_attached_are_seen(layout):
    config = popmm.PopConfig(ffn_ratio=0.4, selection="mask", layout=layout)
    model, fresh = tiny.moe("mixtral"), tiny.moe("mixtral")
    for name, parameter in fresh.named_parameters():
        if "experts" in name:
            parameter.data.copy_(parameter.data.flip(-1 if "down" not in name else -2) * 1.5)
    with popmm.pruned(fresh, config):
        expected = _tokens(fresh)
    with popmm.pruned(model, config):
        model.generate(tiny.prompt(12), max_new_tokens=3, do_sample=False)
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.data.copy_(fresh.get_parameter(name))
        torch.testing.assert_close(_tokens(model), expected, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, fresh.get_parameter(name)), name


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 2


def _replaced_ffn(model):
    model.model.layers[1].mlp = Wrapped(model.model.layers[1].mlp)
    return "model.layers.1.mlp was replaced or wrapped"


def _wrapped_layer(model):
    mlp = model.model.layers[0].mlp
    mlp.up_proj = Wrapped(mlp.up_proj)
    return "model.layers.0.mlp.up_proj was replaced or wrapped"


def _replaced_layer(model):
    mlp = model.model.layers[0].mlp
    mlp.down_proj = nn.Linear(mlp.down_proj.in_features, mlp.down_proj.out_features, bias=False)
    return "model.layers.0.mlp.down_proj was replaced or wrapped"


def _other_forward(model):
    linear = model.model.layers[0].mlp.gate_proj
    linear.forward = lambda x: torch.nn.functional.linear(x, linear.weight) * 2
    return "the forward of model.layers.0.mlp.gate_proj was replaced"


def _our_forward_lost(model):
    del model.model.layers[0].mlp.__dict__["forward"]
    return "the forward of model.layers.0.mlp was replaced"


@pytest.mark.parametrize("change", [_replaced_ffn, _wrapped_layer, _replaced_layer, _other_forward, _our_forward_lost])
def test_a_layer_replaced_or_wrapped_while_attached_is_refused(model, change):
    popmm.attach(model, ffn_ratio=0.4)
    model.generate(tiny.prompt(9), max_new_tokens=3, do_sample=False)
    message = change(model)
    with pytest.raises(RuntimeError, match=message + ".*popmm.detach"):
        model.generate(tiny.prompt(9), max_new_tokens=3, do_sample=False)
    popmm.detach(model)
    model.generate(tiny.prompt(9), max_new_tokens=3, do_sample=False)


def test_hooks_added_to_layers_warn_once(model):
    with popmm.pruned(model, ffn_ratio=0.4):
        model.generate(tiny.prompt(9), max_new_tokens=2, do_sample=False)
        for layer in model.model.layers:
            layer.mlp.down_proj.register_forward_hook(lambda *args: None)
        with pytest.warns(UserWarning, match="hooks were added to layers of model.layers.0.mlp") as caught:
            model.generate(tiny.prompt(9), max_new_tokens=2, do_sample=False)
            model.generate(tiny.prompt(9), max_new_tokens=2, do_sample=False)
        assert len(caught) == 1


def test_accelerate_hooks_may_come_while_attached_and_go_after_detach(model):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    expected = model.generate(tiny.prompt(9), max_new_tokens=4, do_sample=False)
    places = [model, model.model, model.model.layers[0].mlp]
    state = popmm.attach(model, ffn_ratio=0.4)
    for place in places:
        add_hook_to_module(place, ModelHook())
    model.generate(tiny.prompt(9), max_new_tokens=4, do_sample=False)
    assert state.passes["decode"] == 3
    popmm.detach(model)
    assert torch.equal(model.generate(tiny.prompt(9), max_new_tokens=4, do_sample=False), expected)
    for place in places:
        remove_hook_from_module(place)
    assert torch.equal(model.generate(tiny.prompt(9), max_new_tokens=4, do_sample=False), expected)
    with popmm.pruned(model, ffn_ratio=0.4) as state:
        model.generate(tiny.prompt(9), max_new_tokens=4, do_sample=False)
        assert state.passes["decode"] == 3


def test_shared_memory_and_views_of_a_flat_buffer_survive(model):
    """``gate`` with ``permute`` stores down by channel, but not where others read it."""
    flat = torch.cat([layer.mlp.down_proj.weight.detach().flatten() for layer in model.model.layers])
    for part, layer in zip(flat.chunk(2), model.model.layers):
        layer.mlp.down_proj.weight.data = part.view(layer.mlp.down_proj.weight.shape)
    model.share_memory()
    before, places = flat.clone(), [layer.mlp.down_proj.weight.data_ptr() for layer in model.model.layers]
    with popmm.pruned(model, ffn_ratio=0.4, selection="gate", layout="permute"):
        model.generate(tiny.prompt(9), max_new_tokens=3, do_sample=False)
        assert torch.equal(flat, before)
        flat.mul_(1.5)  # somebody loads through the buffer
        before = flat.clone()
    assert torch.equal(flat, before)
    assert [layer.mlp.down_proj.weight.data_ptr() for layer in model.model.layers] == places
    assert all(layer.mlp.down_proj.weight.is_contiguous() for layer in model.model.layers)
    assert all(parameter.is_shared() for parameter in model.parameters())


def test_down_is_turned_in_its_own_memory(model):
    weight = model.model.layers[0].mlp.down_proj.weight
    place, before = weight.data_ptr(), weight.detach().clone()
    with popmm.pruned(model, ffn_ratio=0.4, selection="gate", layout="permute"):
        assert weight.stride() == (1, 32) and weight.data_ptr() == place
        assert torch.equal(weight, before)
    assert weight.is_contiguous() and weight.data_ptr() == place and torch.equal(weight, before)


ODD_WRITES = {
    "neg": lambda w: w.neg_(),
    "abs": lambda w: w.abs_(),
    "square": lambda w: w.pow_(2),
    "shift": lambda w: w.add_(1.0),
    "zero": lambda w: w.zero_(),
}


@pytest.mark.parametrize("write", ODD_WRITES)
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_writes_in_place_keep_the_order_that_they_found(model, write, name):
    config = popmm.PopConfig(ffn_ratio=0.4, selection="mask", layout="permute")
    fresh = tiny.dense("llama")
    ODD_WRITES[write](getattr(fresh.model.layers[0].mlp, name).weight.data)
    with popmm.pruned(model, config):
        model.generate(tiny.prompt(12), max_new_tokens=3, do_sample=False)
        ODD_WRITES[write](getattr(model.model.layers[0].mlp, name).weight.data)
    for (name, parameter), other in zip(model.named_parameters(), fresh.parameters()):
        assert torch.equal(parameter, other), name


def test_weights_put_aside_while_permuted_come_back_as_they_were(model):
    """As a trainer swaps averaged weights in and out."""
    parameters = {n: p for n, p in model.named_parameters() if "mlp" in n}
    saved = {name: p.data for name, p in parameters.items()}
    averaged = {name: p.data * 0.9 for name, p in parameters.items()}
    before = {name: p.clone() for name, p in averaged.items()}
    with popmm.pruned(model, ffn_ratio=0.4, selection="mask", layout="permute"):
        model.generate(tiny.prompt(12), max_new_tokens=3, do_sample=False)
        for name, p in parameters.items():
            p.data = averaged[name]
        model.generate(tiny.prompt(9, seed=2), max_new_tokens=3, do_sample=False)
        for name, p in parameters.items():
            p.data = saved[name]
    for name, p in parameters.items():
        assert p.data_ptr() == saved[name].data_ptr()
        assert torch.equal(p, _original(model)[name]), name
        assert torch.equal(averaged[name], before[name]), name


def test_weights_lent_to_one_call_come_back_as_they_were(model):
    lent = {name: p.detach() * 1.1 for name, p in model.named_parameters()}
    before = {name: p.clone() for name, p in lent.items()}
    with popmm.pruned(model, ffn_ratio=0.4, selection="mask", layout="permute"):
        model.generate(tiny.prompt(12), max_new_tokens=3, do_sample=False)
        with torch.no_grad():
            torch.func.functional_call(model, lent, (tiny.prompt(9),))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, _original(model)[name]), name
        assert torch.equal(lent[name], before[name]), name

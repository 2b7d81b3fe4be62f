"""Attach and detach are one act: interrupted at any line, nothing of them is left behind."""

from __future__ import annotations

import pytest
import tiny
import torch
from interrupts import interrupt, lines_of, picture_of

import popmm
from popmm.runtime.attachment import MARKER

MODELS = {
    "llama-copy": (lambda: tiny.dense("llama-bias", num_hidden_layers=1), dict(selection="mask", layout="copy")),
    "llama-permute": (lambda: tiny.dense("llama", num_hidden_layers=1), dict(selection="mask", layout="permute")),
    "llama-gate": (lambda: tiny.dense("llama", num_hidden_layers=1), dict(selection="gate", layout="permute")),
    "mixtral": (lambda: tiny.moe("mixtral"), dict(selection="gate", layout="permute")),
}
ACTS = ("attach", "detach", "pruned")


def _attached(model) -> bool:
    return MARKER in model.get_decoder().__dict__


def _act(model, act: str, config):
    """(what comes before, the act to interrupt, what to do after it)."""

    def prompt():
        with torch.no_grad():
            model(tiny.prompt(9))

    def block():
        with popmm.pruned(model, config):
            prompt()

    if act == "attach":
        return (lambda: None), (lambda: popmm.attach(model, config))
    if act == "detach":
        return (lambda: (popmm.attach(model, config), prompt())), (lambda: popmm.detach(model))
    return (lambda: None), block


def _sweep(name: str, act: str, by_signal: bool, every: int) -> tuple[int, list[str]]:
    build, settings = MODELS[name]
    model, config = build(), popmm.PopConfig(ffn_ratio=0.5, **settings)
    with popmm.pruned(model, config):  # what is made once in a process is made now
        model(tiny.prompt(9))
    before = picture_of(model)
    first, call = _act(model, act, config)
    first()
    lines = lines_of(call)
    if _attached(model):
        popmm.detach(model)
    assert picture_of(model) == before
    left = []
    for line in lines[::every]:
        first()
        raised = interrupt(call, line, by_signal)
        if _attached(model):
            if act == "pruned" or (act == "attach" and raised):
                left.append(f"{line}: still attached")
            popmm.detach(model)
        after = picture_of(model)
        if after != before:
            left.append(f"{line}: {[key for key in after if after.get(key) != before.get(key)][:3]}")
            before = after
    return len(lines), left


@pytest.mark.parametrize("by_signal", [True, False], ids=["signal", "exception"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", list(MODELS))
def test_an_interrupted_act_leaves_nothing_behind(name, act, by_signal):
    n, left = _sweep(name, act, by_signal, every=29)
    assert n > 50
    assert not left, "\n".join(left)


@pytest.mark.slow
@pytest.mark.parametrize("by_signal", [True, False], ids=["signal", "exception"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", list(MODELS))
def test_an_act_interrupted_at_every_line_leaves_nothing_behind(name, act, by_signal):
    _, left = _sweep(name, act, by_signal, every=1)
    assert not left, "\n".join(left)

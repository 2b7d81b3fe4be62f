"""Tensor parallelism: each process chooses among its own channels, and nothing is sent that was not sent before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed

import popmm
from popmm.layouts import tiers as layout
from popmm.method.tiers import assign, tier_sizes, together

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

HERE = Path(__file__).parent
SETTINGS = [
    dict(bytes=1.0),
    dict(bytes=0.3),
    dict(bytes=0.3, statistics="weights"),
    dict(ffn_ratio=0.4, selection="mask"),
    dict(ffn_ratio=0.4, selection="gate", gate_bits=16),
    dict(pruning_ratio=0.2, selection="keep"),
    dict(bytes=0.3, importance="griffin"),
    dict(bytes=0.3, weights="replace"),
    dict(bytes=0.3, rest_bits=8),
]


@pytest.fixture(scope="module")
def model():
    return tiny.dense("llama")


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread")
    model.save_pretrained(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(HERE / "two_processes.py"), str(folder), json.dumps(SETTINGS)]
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    lines = [line for line in run.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, run.stdout + run.stderr
    return json.loads(lines[0].removeprefix("FOUND"))


def text_of(model, **settings) -> list:
    ids, how = tiny.prompt(9, batch=2), dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    if not settings:
        return model.generate(ids, **how)[:, 9:].tolist()
    with popmm.pruned(model, **settings):
        return model.generate(ids, **how)[:, 9:].tolist()


def test_processes_agree_and_the_model_is_as_before(found, model):
    assert found["agree"] is True
    assert found["dense"] == found["after"] == text_of(model)


def test_ratio_nought_is_dense(found, model):
    assert found["pruned"][0]["text"] == text_of(model)


def test_each_process_prunes_its_own_half(found):
    for own in found["pruned"]:
        assert own["d_ff"] == 40 and own["passes"] == {"decode": 7, "dense": 0}


@pytest.mark.parametrize("place", [1, 2])
def test_the_text_is_that_of_one_process_that_chooses_in_two_halves(found, model, monkeypatch, place):
    def in_halves(score, tiers):
        half = score.shape[-1] // 2
        own = tier_sizes(half, 0.3, 32, tokens=len(score)).tiers
        first, second = assign(score[:, :half], own), assign(score[:, half:], own)
        return [torch.cat([a, b + half], dim=1) for a, b in zip(first, second)]

    def vote_in_halves(score, votes):
        half = score.shape[-1] // 2
        return torch.cat([together(score[..., :half], votes), together(score[..., half:], votes)], dim=-1)

    monkeypatch.setattr(layout, "assign", in_halves)
    monkeypatch.setattr(layout, "together", vote_in_halves)
    monkeypatch.setattr(layout.kernels, "serves_tiers", lambda rows: False)  # which choose by themselves
    assert found["pruned"][place]["text"] == text_of(model, **SETTINGS[place])


def test_what_needs_all_channels_in_one_place_is_refused(found):
    griffin, replaced, rest = found["refused"]
    assert "importance='griffin'" in griffin and "give 'wanda'" in griffin
    assert "weights='replace'" in replaced and "leave it 'keep'" in replaced
    assert "rest_bits=8" in rest and "leave it 16" in rest


def test_shares_are_of_the_whole_model(found, model):
    """A pruning ratio of a block counts the channels of all processes: 20 % of it leave as many channels as alone."""
    with popmm.pruned(model, pruning_ratio=0.2, selection="keep") as state:
        alone = state.ffn_ratio
    assert found["pruned"][5]["ratio"] == pytest.approx(alone)

"""docs/models.md says what popmm does with each family of transformers, and its checks find what they are to find."""

from pathlib import Path

import families
import families_page
import ffn_count
import pytest
import small_families
import tiny
import transformers
from torch import nn

from popmm import adapters

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
SAME_VERSION = f"(transformers {transformers.__version__}," in PAGE.read_text()
FEW = ["llama", "gpt2", "mamba", "step3p7", "qwen2_5_vl", "nemotron_h"]


@pytest.mark.parametrize("family", [name for name in FEW if name in small_families.families()])
def test_the_page_says_what_is_found(family):
    row = families.survey(family)
    assert row["status"] != families.FAILED, row["reason"]
    if SAME_VERSION:
        assert families_page.differences(families_page.read(PAGE), [row]) == []


def test_every_row_of_the_page_has_an_outcome_and_refusals_a_reason():
    rows = families_page.read(PAGE)
    assert len(rows) > 200 and not any(row["status"] == families.FAILED for row in rows)
    assert all(row["reason"] for row in rows if row["status"] != families.PASSED)
    assert all(row["sites"] == row["present"] > 0 for row in rows if row["status"] == families.PASSED)


def test_an_ffn_that_nobody_names_is_a_failure(monkeypatch):
    plain = adapters.describe

    def forgetful(model, **settings):
        found = plain(model, **settings)
        found.layers[-1].sites.clear()
        return found

    monkeypatch.setattr(adapters, "describe", forgetful)
    row = families.survey("llama")
    assert row["status"] == families.FAILED and "neither finds nor names: model.layers.1.mlp" in row["reason"]


def test_a_broken_promise_is_a_failure(monkeypatch):
    from popmm.layouts.copy import CopyLayout

    release = CopyLayout.release

    def careless(self):
        release(self)
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1

    model = small_families.small_model("llama")
    monkeypatch.setattr(small_families, "small_model", lambda family: model)
    monkeypatch.setattr(CopyLayout, "release", careless)
    row = families.survey("llama")
    assert row["status"] == families.FAILED
    assert row["reason"] == "mask: detach gave model.layers.0.mlp.up_proj.weight back changed"


def test_ffns_are_counted_by_what_they_do(llama):
    class Spread(nn.Module):
        """An attention block whose FFN is no module by itself."""

        def __init__(self, attention):
            super().__init__()
            self.attention, self.up, self.down = attention, nn.Linear(32, 80), nn.Linear(80, 32)

        def forward(self, x, **settings):
            y = self.attention(x, **settings)[0]
            return y + self.down(nn.functional.gelu(self.up(y)))

    class Mixer(nn.Module):
        """A block of the same layers that sums over tokens."""

        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(32, 80), nn.Linear(80, 32)

        def forward(self, x):
            return self.down(self.up(x).cumsum(1).tanh())

    llama.model.layers[0].mlp = Mixer()
    present, missed = ffn_count.count_ffns(llama, 32, set(), lambda name: False)
    assert present == missed == ["model.layers.1.mlp"]
    block = Spread(tiny.dense("llama").model.layers[0])
    llama.model.layers[0] = block
    present, _ = ffn_count.count_ffns(llama, 32, set(), lambda name: False)
    assert present == ["model.layers.0", "model.layers.0.attention.mlp", "model.layers.1.mlp"]


def test_the_page_reads_as_it_was_written(tmp_path):
    row = dict(family="a", model="AForCausalLM", kind="dense", sites=1, present=2, status="refused", reason="x | y")
    families_page.write(tmp_path / "page.md", [row, {**row, "family": "b", "reason": ""}])
    assert families_page.read(tmp_path / "page.md") == [row, {**row, "family": "b", "reason": ""}]
    found = families_page.differences([row], [{**row, "status": "passed"}])
    assert found == ["a: status is passed (x | y), the page says refused"]


def test_a_family_that_kills_its_process_is_a_failure_and_the_others_go_on(monkeypatch, tmp_path):
    script = tmp_path / "families.py"
    script.write_text("import sys, os\nfor line in sys.stdin:\n    os._exit(3)\n")
    monkeypatch.setattr(families, "__file__", str(script))
    rows = families.survey_all(["llama", "mixtral"], processes=1)
    assert [row["reason"] for row in rows] == ["the process ended with 3"] * 2


@pytest.mark.slow
def test_the_whole_page_is_what_is_found():
    rows = families.survey_all(sorted(small_families.families()))
    assert [f"{row['family']}: {row['reason']}" for row in rows if row["status"] == families.FAILED] == []
    if SAME_VERSION:
        assert families_page.differences(families_page.read(PAGE), rows) == []

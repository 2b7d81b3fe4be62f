"""The paper's tables on one model: figures as by hand, and a line for what cannot be run."""

import json

import pytest
import torch

import popmm
from popmm import zoo
from popmm.cli import main
from popmm.evaluation.paper import GAMMAS, mask_rows, pass_rows
from popmm.evaluation.texts import cases_of

STORY = "Once upon a time there was a little girl named Lily. She had a red ball and a big dog. They went out to play. "


@pytest.fixture(scope="module")
def stories():
    return zoo.load("stories")


@pytest.fixture(scope="module")
def texts(stories):
    ids = stories[1](STORY * 8, return_tensors="pt")["input_ids"][0]
    return [ids[:48], ids[48:96]]


@torch.no_grad()
def test_perplexity_of_one_pass_is_that_of_the_texts_read_at_once(stories, texts):
    model, _ = stories
    rows = pass_rows(model, cases_of(texts, 16))

    def by_hand():
        found = []
        for ids in texts:
            likely = model(ids[None]).logits[0].log_softmax(-1)
            found += [likely[i, ids[i + 1]] for i in range(len(ids) - 1)]
        return torch.stack(found).mean().neg().exp().item()

    assert rows[0].perplexity == pytest.approx(by_hand(), rel=1e-4) and rows[0].tokens == 94
    for row, ratio in zip(rows[1:], (0.2, 0.4)):
        with popmm.pruned(model, popmm.PopConfig.paper(pruning_ratio=ratio)):
            assert row.perplexity == pytest.approx(by_hand(), rel=1e-4)
        assert row.perplexity != pytest.approx(rows[0].perplexity, rel=1e-4)


def test_a_wider_band_is_nearer_to_re_scoring_all(stories, texts):
    rows = mask_rows(stories[0], [cases_of(texts, 16)])
    for ratio in (0.2, 0.4):
        own = [row.kl for row in rows if row.pruning_ratio == ratio]
        assert len(own) == 2 + len(GAMMAS) and own == sorted(own, reverse=True)
    assert rows[-1].bytes_share == pytest.approx(0.33, abs=0.01)


def test_widths_that_tiers_cannot_take_have_no_row_of_the_default(texts):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=2, vocab_size=4096
    )
    rows = mask_rows(LlamaForCausalLM(config).eval(), [cases_of(texts, 16)])
    assert rows[-1].method == "all re-scored"


def test_what_has_no_data_is_one_line_each(capsys):
    assert main(["eval", "--paper"]) == 0
    out = capsys.readouterr().out
    assert "20% of the blocks' weights: 23.3% of the FFNs' channels" in out
    assert out.count("not run, for want of data") == 4 and "boolq, rte, hellaswag" in out
    model = zoo.load("stories")[0]
    layer = model.model.layers[0]
    ffn = sum(p.numel() for p in layer.mlp.parameters())
    attention = sum(p.numel() for p in layer.self_attn.parameters())
    assert f"{0.2 * (ffn + attention) / ffn:.1%}" == "23.3%"


def test_the_text_s_tables_as_json(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(STORY * 40)
    size = ["--context", "16", "--continuation", "16", "--texts-per-subset", "1", "--subsets", "2"]
    assert main(["eval", "--paper", "--text", str(tmp_path / "a.txt"), *size, "--json", str(tmp_path / "b.json")]) == 0
    data = json.loads((tmp_path / "b.json").read_text())
    assert set(data["tables"]) == {"ratios", "perplexity", "masks"} and str(tmp_path) not in json.dumps(data)
    assert "| POP, gamma 0.1 | 40% pruned |" in capsys.readouterr().out


@pytest.mark.slow  # reads all of the harness' tasks
def test_a_task_of_the_paper_from_a_file(tmp_path, capsys):
    pytest.importorskip("lm_eval")
    item = {"activity_label": "Play", "ctx_a": "Lily had a ball.", "ctx_b": "she", "label": 1}
    rows = [{**item, "ind": i, "endings": ["no no", "played with it.", "tree", "sat"]} for i in range(3)]
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "b.json"
    assert main(["eval", "--paper", "--task-file", f"hellaswag={tmp_path / 'h.jsonl'}", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    names = ["dense", "POP, 20% pruned", "POP, 40% pruned", "popmm's default"]
    assert [row["setting"] for row in found["tables"]["paper-qa"]] == names
    assert found["settings"]["task_file"] == "hellaswag=h.jsonl"
    assert "hellaswag" not in capsys.readouterr().out.split("for want of data")[1]

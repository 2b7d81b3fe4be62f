"""The bench measures what its columns say, and the GPU suite's dry run works."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel

from popmm.cli import bench, main
from popmm.cli.bench import Bench, ways
from popmm.cli.bench_rows import bench_markdown
from popmm.cli.shapes import SHAPES, random_model, shape_config
from popmm.evaluation.traffic import other_bytes


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_layers_and_widths_they_are_named_for(name):
    text = shape_config(name).get_text_config()
    tiny = random_model(shape_config(name, tiny=True), torch.float32, "cpu")
    assert tiny.config.get_text_config().hidden_size == text.hidden_size // 16
    assert shape_config(name, layers=3).get_text_config().num_hidden_layers == 3
    with torch.device("meta"):
        n = sum(p.numel() for p in AutoModel.from_config(shape_config(name)).parameters()) / 1e9
    expected = {"llama-3.1-8b": 7.5, "qwen3-8b": 7.6, "qwen2.5-vl-7b": 7.1, "mixtral-8x7b": 46.6}
    expected |= {"qwen1.5-moe": 14.0, "qwen3-30b-a3b": 30.2, "dense-2k": 0.55, "moe-1k": 1.16}
    assert n == pytest.approx(expected[name], rel=0.03)


def test_columns_follow_from_times_and_bytes():
    model = random_model(shape_config("llama-3.1-8b", tiny=True), torch.float32, "cpu")
    rows = Bench(model, 1, 8, 10).run(ways(model, ["keep", "gate8"], [0.2], ["auto"], compiled=False), rounds=1)
    dense, keep, gate = rows
    assert [row.row for row in rows] == ["dense eager", "keep 20%", "gate8 20%"]
    ffn = 3 * 256 * 896 * 2 * 4
    assert dense.ffn_bytes == ffn and dense.total_bytes == ffn + other_bytes(model)
    layers = sum(p.numel() for p in model.model.parameters()) - model.model.embed_tokens.weight.numel()
    assert dense.total_bytes == 4 * (layers + model.lm_head.weight.numel())
    assert keep.ffn_bytes < dense.ffn_bytes and gate.ffn_bytes < dense.ffn_bytes
    for row in rows:
        assert row.speed_up == pytest.approx(dense.ms / row.ms)
        assert row.of_bytes_ratio == pytest.approx(row.speed_up * row.total_bytes / dense.total_bytes)
        assert row.gb_per_second == pytest.approx(row.total_bytes / (row.ms / 1e3) / 1e9)
        assert row.ms_p10 <= row.ms <= row.ms_p90
    assert keep.partition_ms > 0 and dense.partition_ms == 0
    assert "| keep 20% |" in bench_markdown(rows)


def test_int8_row_counts_one_byte_per_linear_weight(monkeypatch):
    model = random_model(shape_config("llama-3.1-8b", tiny=True), torch.bfloat16, "cpu")
    monkeypatch.setattr(bench, "quantised_copy", copy.deepcopy)
    eager, compiled, int8 = Bench(model, 1, 8, 10).run(ways(model, [], [], ["auto"], True, int8=True), rounds=1)
    assert int8.row.startswith("dense int8")
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert int8.total_bytes - 2 * norms == (eager.total_bytes - 2 * norms) / 2
    # the faster dense row is the baseline, never the int8 row
    assert max(eager.speed_up, compiled.speed_up) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give either --shape, such as llama-3.1-8b, or --model"),
        (["--shape", "gpt-5"], "--shape gpt-5: give one of llama-3.1-8b"),
        (["--shape", "dense-2k", "--new-tokens", "2"], "--new-tokens 2: give 8 or more"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_bench_command_writes_rows_and_a_plot(tmp_path, capsys):
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "plot.png")]
    how = ["--tiny", "--prompt-tokens", "8", "--new-tokens", "8", "--rounds", "1", "--ratios", "0.2"]
    assert main(["bench", "--shape", "moe-1k", *how, *files]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["row"] for row in rows][:3] == ["dense eager", "dense grouped_mm", "gate 20%"]
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert "moe-1k (tiny), float32, batch 1" in capsys.readouterr().out


def test_rows_by_batch(tmp_path, capsys):
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "plot.png")]
    how = ["--tiny", "--prompt-tokens", "8", "--new-tokens", "8", "--rounds", "1", "--selections", "gate", "--ratios"]
    more = ["0.2", "--bytes", "0.33", "--batch", "1,10"]
    assert main(["bench", "--shape", "llama-3.1-8b", *how, *more, *files]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    names = ["dense eager", "gate 20%", "tiers, bytes 0.33"]
    assert [(row["row"], row["batch"]) for row in rows] == [(name, n) for n in (1, 10) for name in names]
    dense, gate, tiers = rows[3:]
    assert tiers["ffn_bytes"] < dense["ffn_bytes"] / 2  # of float32, read once for all ten
    assert gate["ffn_bytes"] == dense["ffn_bytes"]  # each of the ten chooses other rows
    assert dense["tokens_per_second"] == pytest.approx(10e3 / dense["ms"])
    assert "batch 1,10" in capsys.readouterr().out
    assert main(["bench", "--shape", "llama-3.1-8b", "--batch", "0,2"]) == 2


@pytest.mark.slow
def test_dry_run_of_the_gpu_suite(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = ["benchmarks/gpu_suite.sh", "--tiny"]  # .ci/run runs this test too
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "suite.json").read_text())
    drafts = [result["rows"] for result in results if "tokens_per_round" in result["rows"][0]]
    assert [row["row"] for row in drafts[0]] == [
        f"{n} {how}" for n in ("dense", "lossless") for how in ("eager", "compiled")
    ]
    rows = [row for result in results for row in result["rows"] if "recompilations" in row]
    labels = {row["row"] for row in rows} - {"dense int8 (torchao), compiled"}  # where torchao is installed
    assert labels == {"dense eager", "dense compiled", "keep 20%", "gate4 20%", "tiers 20%"}
    assert all(row["recompilations"] == 0 for row in rows if not row["row"].startswith("dense"))
    assert "| keep 20% |" in run.stdout

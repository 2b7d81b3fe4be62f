"""lm-evaluation-harness on pruned models: the same scores as by hand, and as the harness' own at ratio 0."""

import functools
import json
import subprocess
import sys

import pytest
import torch

import popmm
from popmm import zoo
from popmm.cli import main
from popmm.compat import cache_argument, cache_of
from popmm.evaluation.methods import quantised_ffns
from popmm.evaluation.presets import PRESETS
from popmm.evaluation.tasks import SAME, at_bytes, at_ratios, evaluate_tasks

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402

from popmm.evaluation.harness import PopLM  # noqa: E402

STORIES = [
    "Once upon a time there was a little girl named Lily. She had a red ball and",
    "Tom and his dog went to the park. They saw a big tree and Tom wanted to climb it. His dog barked and",
    "It was a sunny day. The bird sang.",
]
ENDINGS = [" she loved to play with it.", " ran around the tree.", " It was happy and flew to the sea.", " no no no"]


@pytest.fixture(scope="module")
def stories():
    return zoo.load("stories")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with three local tasks over one local file."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"text": STORIES[i % 3], "choices": [ENDINGS[i % 4], ENDINGS[(i + 1) % 4]], "label": i % 2} for i in range(6)
    ]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}\ntest_split: test\n"
    (folder / "choice.yaml").write_text(
        "task: local_choice\noutput_type: multiple_choice\n"
        'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n" + common
    )
    (folder / "rolling.yaml").write_text(
        "task: local_rolling\noutput_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}{{choices[0]}}"\n'
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n" + common
    )
    (folder / "generate.yaml").write_text(
        "task: local_generate\noutput_type: generate_until\n"
        'doc_to_text: "{{text}}"\ndoc_to_target: "{{choices[0]}}"\n'
        'generation_kwargs: {until: ["."], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n' + common
    )
    return folder


@pytest.fixture
def local_tasks_only(monkeypatch):
    """Reading all of the harness' own tasks takes seconds."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))


def results(lm, folder):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    names = ["local_choice", "local_rolling", "local_generate"]
    return lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True)


def test_ratio_zero_equals_the_harness_own_model(stories, tasks):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = stories
    expected = results(HFLM(model, tokenizer=tokenizer, batch_size=4), tasks)
    lm = PopLM(model, tokenizer=tokenizer, batch_size=4, pruning_ratio=0)
    found = results(lm, tasks)
    lm.detach()
    assert found["results"] == expected["results"]
    for name, samples in expected["samples"].items():
        assert [s["resps"] for s in found["samples"][name]] == [s["resps"] for s in samples]


def test_the_harness_finds_popmm_by_name(tasks):
    code = "import sys; from lm_eval.__main__ import cli_evaluate; sys.exit(cli_evaluate())"
    arguments = ["--model", "popmm", "--model_args", "pretrained=zoo:stories,pruning_ratio=0.2,selection=gate"]
    arguments += ["--tasks", "local_choice", "--include_path", str(tasks), "--limit", "2"]
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "local_choice" in run.stdout and "popmm ({" in run.stdout


@pytest.mark.parametrize("selection", ["gate", "mask"])
def test_likelihood_of_a_continuation_is_that_of_decoding_it(stories, selection):
    model, tokenizer = stories
    lm = PopLM(model, tokenizer=tokenizer, pruning_ratio=0.3, selection=selection)
    requests = [((s, e), tokenizer(s)["input_ids"], tokenizer(e)["input_ids"]) for s, e in zip(STORIES, ENDINGS)]
    try:
        found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        for (score, greedy), (_, context, ending) in zip(found, requests):
            with torch.no_grad():
                out = model(torch.tensor([context]))
                logits = [out.logits[0, -1]]
                for token in ending[:-1]:  # one by one
                    step = model(torch.tensor([[token]]), **cache_argument(model, cache_of(out)))
                    logits.append(step.logits[0, -1])
            own = torch.stack(logits).log_softmax(-1)
            expected = own.gather(1, torch.tensor(ending)[:, None]).sum().item()
            assert score == pytest.approx(expected, abs=1e-4)
            assert greedy == bool((own.argmax(-1) == torch.tensor(ending)).all())
    finally:
        lm.detach()


@torch.no_grad()
def test_a_batch_shares_a_partition_of_all_its_prompts_but_no_padding(stories):
    model, tokenizer = stories
    lm = PopLM(model, tokenizer=tokenizer, pruning_ratio=0.3, batch_size=3)
    requests = [((s, e), tokenizer(s)["input_ids"], tokenizer(e)["input_ids"]) for s, e in zip(STORIES, ENDINGS)]
    try:
        found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        together = {name: p.importance for name, p in lm.state.layers.items()}
        squares = dict.fromkeys(together, 0)
        for _, context, _ in requests:
            model(torch.tensor([context]))
            squares = {name: squares[name] + p.importance.double().square() for name, p in lm.state.layers.items()}
        for name, importance in together.items():
            torch.testing.assert_close(importance.double(), squares[name].sqrt(), rtol=1e-4, atol=1e-6)
        # each row by itself on the batch's partition
        length = max(len(context) for _, context, _ in requests)
        ids = torch.tensor([[0] * (length - len(c)) + c for _, c, _ in requests])
        mask = torch.tensor([[0] * (length - len(c)) + [1] * len(c) for _, c, _ in requests])
        for row, (_, _, ending) in enumerate(requests):
            where = (mask.cumsum(-1) - 1).clamp(min=0)
            out = model(ids, attention_mask=mask, position_ids=where)
            logits, own_mask, at = [out.logits[row, -1]], mask, where[:, -1:]
            for token in ending[:-1]:
                own_mask, at = torch.cat([own_mask, torch.ones(3, 1, dtype=torch.long)], 1), at + 1
                step = torch.full((3, 1), token)
                past = cache_argument(model, cache_of(out))
                logits.append(model(step, attention_mask=own_mask, position_ids=at, **past).logits[row, -1])
            own = torch.stack(logits).log_softmax(-1)
            expected = own.gather(1, torch.tensor(ending)[:, None]).sum().item()
            # in larger batches gate lets all channels pass, simulated decode each token's best
            assert found[row][0] == pytest.approx(expected, rel=0.05)
    finally:
        lm.detach()


def test_scoring_in_one_prompt_pass_prunes_as_the_paper_does(stories):
    model, tokenizer = stories
    lm = PopLM(model, tokenizer=tokenizer, scoring="prompt", pruning_ratio=0.4, selection="mask", prefill="pruned")
    context, ending = tokenizer(STORIES[0])["input_ids"], tokenizer(ENDINGS[0])["input_ids"]
    try:
        ((score, _),) = lm._loglikelihood_tokens([(("", ""), context, ending)], disable_tqdm=True)
        with torch.no_grad():
            logits = model(torch.tensor([(context + ending)[:-1]])).logits[0].log_softmax(-1)
        expected = logits[len(context) - 1 :].gather(1, torch.tensor(ending)[:, None]).sum().item()
        assert score == pytest.approx(expected, abs=1e-4)
    finally:
        lm.detach()
    with torch.no_grad():
        dense = model(torch.tensor([(context + ending)[:-1]])).logits[0].log_softmax(-1)
    assert abs(dense[len(context) - 1 :].gather(1, torch.tensor(ending)[:, None]).sum().item() - score) > 0.01


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": "auto"}, "batch_size='auto': give a number"),
        ({"scoring": "once"}, "scoring='once': give one of 'decode', 'prompt'"),
        ({"rolling_prompt": 0}, "rolling_prompt=0: give 1 token or more"),
        ({"pruning_ratio": 1.5}, "pruning_ratio=1.5 is not a ratio"),
        ({"refresh_every": 4}, "refresh_every=4: likelihoods are scored without it"),
    ],
)
def test_wrong_settings_are_named(stories, settings, message):
    with pytest.raises(ValueError, match=message):
        PopLM(stories[0], tokenizer=stories[1], **settings)


def test_continuations_longer_than_the_model_are_refused(stories):
    lm = PopLM(stories[0], tokenizer=stories[1], pruning_ratio=0.2)
    try:
        for context, ending in (([5], [7] * 513), ([], [7])):
            with pytest.raises(ValueError, match="no more to decode than max_length=512"):
                lm._loglikelihood_tokens([(("", ""), context, ending)], disable_tqdm=True)
    finally:
        lm.detach()


def test_the_name_survives_a_probe_for_the_harness():
    code = "import importlib.util as u; u.find_spec('lm_eval.models'); import lm_eval.models\n"
    code += "from lm_eval.api.registry import model_registry; print('popmm' in model_registry)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr


def test_eval_command_runs_tasks_dense_and_pruned(tasks, capsys, tmp_path, local_tasks_only):
    arguments = ["--tasks", "local_choice,local_rolling", "--include-path", str(tasks), "--ratios", "0.4"]
    assert main(["eval", *arguments, "--json", str(tmp_path / "rows.json")]) == 0
    out = capsys.readouterr().out
    assert "| local_choice | acc |" in out and "40% pruned" in out
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["task"], row["pruning_ratio"]) for row in rows][:2] == [("local_choice", 0.0), ("local_rolling", 0.0)]


def test_a_task_takes_its_items_from_a_local_file(stories, tasks, tmp_path, local_tasks_only):
    rows = [json.loads(line) for line in (tasks / "items.jsonl").read_text().splitlines()]
    (tmp_path / "other.jsonl").write_text("\n".join(json.dumps({**row, "label": 1 - row["label"]}) for row in rows))
    settings = at_ratios(popmm.PopConfig(selection="mask"), [0.4])
    how = dict(tasks=["local_choice"], settings=settings, include_path=tasks)
    as_written = evaluate_tasks(*stories, **how)
    flipped = evaluate_tasks(*stories, **how, files={"local_choice": tmp_path / "other.jsonl"})
    assert [row.setting for row in flipped] == ["dense", "40% pruned"]
    for one, other in zip(as_written, flipped):
        assert other.metrics["acc,none"] == pytest.approx(1 - one.metrics["acc,none"])
        assert other.metrics[SAME] == one.metrics[SAME] <= as_written[0].metrics[SAME] == 1


def test_tasks_at_equal_bytes_beside_plain_quantisers(stories, tasks, local_tasks_only):
    model, tokenizer = stories
    before = [p.detach().clone() for p in model.parameters()]
    settings = at_bytes(model, popmm.PopConfig(), [0.3, 0.2], ["tiers", "weights at int4", "weights at int3"])
    rows = evaluate_tasks(model, tokenizer, ["local_choice", "local_generate"], settings, include_path=tasks)
    shares = {row.setting: row.bytes_share for row in rows}
    assert list(shares) == ["dense", "tiers, 30% of bytes", "tiers, 20% of bytes", "weights at int4", "weights at int3"]
    # of 16 bits, with a scale of 16 bits for 64 weights
    expected = [1, 0.3, 0.2, (4 + 16 / 64) / 16, (3 + 16 / 64) / 16]
    assert list(shares.values()) == [pytest.approx(share, abs=0.004) for share in expected]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    # the same answers, of text: those whose samples are the dense model's
    by_setting = {row.setting: row.metrics[SAME] for row in rows if row.task == "local_generate"}
    lm = PopLM(model, tokenizer=tokenizer, pruning_ratio=0)
    dense = results(lm, tasks)["samples"]["local_generate"]
    with quantised_ffns(model, 3):
        own = results(lm, tasks)["samples"]["local_generate"]
    lm.detach()
    same = [a["resps"] == b["resps"] for a, b in zip(own, dense)]
    assert by_setting["weights at int3"] == pytest.approx(sum(same) / len(same)) and by_setting["dense"] == 1


def test_methods_that_calibrate_are_refused_for_tasks(stories):
    with pytest.raises(ValueError, match="CATS: tasks run without it"):
        at_bytes(stories[0], popmm.PopConfig(), [0.5], ["CATS"])


@pytest.mark.slow  # reads all of the harness' tasks
def test_presets_name_tasks_that_the_harness_knows():
    manager = TaskManager()
    for preset in PRESETS.values():
        assert all(manager.match_tasks([task]) == [task] for task in preset.tasks)
        assert preset.config == popmm.PopConfig.paper() and preset.batch == 10


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "no_such_task"], "unknown task 'no_such_task'"),
        (["--tasks", "humaneval"], "run code that the model writes; allow it with --run-code"),
        (["--preset", "paper-vision"], "give one of paper-qa, paper-generation, paper-wikitext"),
        (["--tasks", "arc_easy", "--batch", "0"], "--batch 0: give numbers of sequences"),
        (["--tasks", "arc_easy", "--task-file", "arc_easy"], "--task-file arc_easy: give NAME=FILE"),
        (["--tasks", "arc_easy", "--task-file", "arc_easy=nowhere"], "nowhere: there is no such file"),
        (["--task-file", "arc_easy=nowhere"], "--task-file or --run-code without --tasks, --preset or --paper"),
        (["--tasks", "arc_easy", "--methods", "tiers"], "--methods with --tasks, which needs --bytes"),
        (["--preset", "paper-qa", "--bytes", "0.3"], "--bytes or --methods with --preset"),
        (["--paper", "--bytes", "0.3"], "--paper, which is settled"),
        (["--paper", "--prefill", "dense", "--selection", "mask"], "--paper, which is settled"),
    ],
)
def test_wrong_tasks_are_refused_in_one_line(arguments, message, capsys, local_tasks_only):
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err

"""Simulated decode is decode, and the measures are what they say."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F

import popmm
from popmm.compat import cache_argument, cache_of
from popmm.evaluation.evaluate import Case, Wanted, evaluate, with_greedy
from popmm.evaluation.methods import METHODS, methods_for
from popmm.evaluation.tables import rows_to_markdown
from popmm.evaluation.texts import cases_of


def models():
    yield from ((name, tiny.dense) for name in ("llama", "phi3", "gemma3"))
    yield from ((name, tiny.moe) for name in ("mixtral", "qwen2-moe", "deepseek-v3"))


@pytest.mark.parametrize("name, build", list(models()))
@pytest.mark.parametrize("selection", ["mask", "keep", "gate"])
@torch.no_grad()
def test_one_simulated_pass_equals_decoding_token_by_token(name, build, selection):
    model = build(name)
    prompt, continuation = tiny.prompt(12), tiny.prompt(7, seed=1)
    band = None if selection == "gate" else 0.3
    with popmm.pruned(model, ffn_ratio=0.4, candidate_fraction=band, selection=selection) as state:
        kept = cache_argument(model, cache_of(model(prompt)))
        one_by_one = [model(continuation[:, i : i + 1], **kept).logits for i in range(7)]
        kept = cache_argument(model, cache_of(model(prompt)))
        with state.simulated_decode(), state.trace() as trace:
            at_once = model(continuation, **kept).logits
    torch.testing.assert_close(at_once, torch.cat(one_by_one, 1), atol=1e-4, rtol=0)
    assert all(mask.shape[0] == 7 for mask in trace.values())


@pytest.mark.parametrize("name, build", [("llama", tiny.dense), ("gemma3", tiny.dense), ("mixtral", tiny.moe)])
@pytest.mark.parametrize("batch", [2, 5])
@torch.no_grad()
def test_so_it_does_in_a_batch_whose_tokens_choose_together(name, build, batch):
    model = build(name)
    prompt, continuation = tiny.prompt(12, batch=batch), tiny.prompt(5, seed=1, batch=batch)
    with popmm.pruned(model, bytes=0.27) as state:
        kept = cache_argument(model, cache_of(model(prompt)))
        with state.trace() as stepped:
            one_by_one = [model(continuation[:, i : i + 1], **kept).logits for i in range(5)]
        kept = cache_argument(model, cache_of(model(prompt)))
        with state.simulated_decode(), state.trace() as trace:
            at_once = model(continuation, **kept).logits
    # our kernels round what they multiply, and a pass of many tokens does not: some channels change their tier
    assert (at_once - torch.cat(one_by_one, 1)).norm() <= 0.06 * at_once.norm()
    for name in trace:
        assert (trace[name] != stepped[name]).float().mean() < 0.02
        if "mixtral" not in type(model).__name__.lower():
            assert (trace[name] == trace[name][:, :1]).all()


@torch.no_grad()
def test_padding_has_no_vote_in_a_simulated_batch(llama):
    """What stands in padded places of a batch changes nothing for the others."""
    prompt, continuation = tiny.prompt(12, batch=2), tiny.prompt(5, seed=1, batch=2)
    mask = torch.ones(2, 17, dtype=torch.int64)
    mask[1, 14:] = 0
    found = []
    with popmm.pruned(llama, bytes=0.27) as state:
        for filler in (3, 9):
            continuation[1, 2:] = filler
            kept = cache_argument(llama, cache_of(llama(prompt, attention_mask=mask[:, :12])))
            with state.simulated_decode():
                found.append(llama(continuation, attention_mask=mask, **kept).logits[0])
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def test_rows_by_batch(llama):
    """A batch's row is of what its tokens choose together; texts that fill none are left out."""
    subsets = [cases_of([tiny.prompt(20, seed=s)[0] for s in range(5)], context=10)]
    wanted = [Wanted("tiers", bytes_share=0.3, batch=n) for n in (1, 2, 4)]
    dense, *rows = evaluate(llama, subsets, wanted, popmm.PopConfig())
    assert [(row.batch, row.texts) for row in rows] == [(1, 5), (2, 4), (4, 4)]
    assert all(row.bytes_share == pytest.approx(0.3, abs=0.02) for row in rows)
    assert rows[0].kl < rows[2].kl and dense.batch == 1
    assert "| tiers | 30% of bytes | 4 |" in rows_to_markdown([dense, *rows])
    with pytest.raises(ValueError, match="batches of 8 need as many texts"):
        evaluate(llama, subsets, [Wanted("tiers", bytes_share=0.3, batch=8)], popmm.PopConfig())


def test_rows_hold_the_measures_of_the_definition(llama):
    texts = [tiny.prompt(20, seed=s)[0] for s in range(4)]
    subsets = [with_greedy(llama, cases_of(part, context=10), 6) for part in (texts[:2], texts[2:])]
    rows = evaluate(llama, subsets, [Wanted("keep", pruning_ratio=0.3)], popmm.PopConfig())
    dense, keep = rows
    assert (dense.method, dense.kl, dense.top1, dense.bytes_share) == ("dense", 0.0, 1.0, 1.0)
    kls, perplexities, agreements, prefixes = [], [], [], []
    for subset in (texts[:2], texts[2:]):
        kl, entropy, agree, prefix = [], [], [], []
        for ids in subset:
            with torch.no_grad():
                reference = llama(ids[None]).logits[0, 10:-1].log_softmax(-1)
                with popmm.pruned(llama, pruning_ratio=0.3, selection="keep"):
                    kept = cache_argument(llama, cache_of(llama(ids[None, :10])))
                    own = [llama(ids[None, i : i + 1], **kept).logits[0] for i in range(10, 19)]
                reference_text = llama.generate(ids[None, :10], do_sample=False, max_new_tokens=6)[0, 10:]
                with popmm.pruned(llama, pruning_ratio=0.3, selection="keep"):
                    text = llama.generate(ids[None, :10], do_sample=False, max_new_tokens=6)[0, 10:]
            prefix.append(next((i for i in range(6) if text[i] != reference_text[i]), 6))
            own = torch.cat(own).log_softmax(-1)
            kl.append((reference.exp() * (reference - own)).sum(-1))
            entropy.append(F.nll_loss(own, ids[11:], reduction="none"))
            agree.append(own.argmax(-1) == reference.argmax(-1))
        kls.append(torch.cat(kl).mean().item())
        perplexities.append(math.exp(torch.cat(entropy).mean().item()))
        agreements.append(torch.cat(agree).float().mean().item())
        prefixes.append(sum(prefix) / 2)
    assert keep.kl == pytest.approx(sum(kls) / 2, rel=1e-3)
    assert keep.perplexity == pytest.approx(sum(perplexities) / 2, rel=1e-4)
    assert keep.top1 == pytest.approx(sum(agreements) / 2)
    assert keep.kl_spread == pytest.approx(abs(kls[0] - kls[1]) / 2**0.5, rel=1e-2)
    assert keep.prefix == pytest.approx(sum(prefixes) / 2)
    with popmm.pruned(llama, pruning_ratio=0.3, selection="keep") as state:
        llama(texts[0][None])
        computed = {len(p.retained) + len(p.candidate) for p in state.layers.values()}.pop()
    assert dense.channels_skipped == 0 and keep.channels_skipped == pytest.approx(1 - computed / 80)
    assert f"| keep | 30% pruned | {keep.bytes_share:.1%} | {keep.channels_skipped:.1%} |" in rows_to_markdown(rows)


def test_all_rescored_reads_all_gate_and_up_rows(llama):
    cases = cases_of([tiny.prompt(20)[0]], context=10)
    (_, row) = evaluate(llama, [cases], [Wanted("all re-scored", pruning_ratio=0.3)], popmm.PopConfig())
    ratio = popmm.budget.ffn_ratio(llama, 0.3)
    assert row.channels_skipped == pytest.approx(1 - round((1 - ratio) * 80) / 80, abs=1e-6)
    assert row.bytes_share == pytest.approx((2 * 80 + round((1 - ratio) * 80)) / (3 * 80), abs=1e-6)


def test_experts_sharing_a_partition_is_a_row_of_models_with_experts(llama):
    assert methods_for(llama) == [name for name, method in METHODS.items() if not method.experts_only]
    model = tiny.moe("mixtral")
    assert methods_for(model) == list(METHODS)
    cases = cases_of([tiny.prompt(30, seed=s)[0] for s in range(2)], context=20)
    names = ["mask", "mask, experts share a partition"]
    rows = evaluate(model, [cases], [Wanted(name, pruning_ratio=0.3) for name in names], popmm.PopConfig())
    assert rows[1].bytes_share == rows[2].bytes_share
    assert rows[1].kl != rows[2].kl


def test_an_exact_answer_is_what_greedy_decoding_gives(llama):
    prompt = tiny.prompt(10)
    with popmm.pruned(llama, ffn_ratio=0.4):
        said = llama.generate(prompt, do_sample=False, max_new_tokens=5)[0, 10:]
    wrong = said.clone()
    wrong[3] = (wrong[3] + 1) % 90
    cases = [Case({"input_ids": prompt}, answer) for answer in (said, wrong, said, said)]
    (_, row) = evaluate(llama, [cases], [Wanted("gate", ffn_ratio=0.4)], popmm.PopConfig())
    assert row.exact == 0.75


def test_unknown_method_is_named(llama):
    with pytest.raises(ValueError, match="unknown method 'best': give some of 'random'"):
        evaluate(llama, [cases_of([tiny.prompt(20)[0]], 10)], [Wanted("best", ffn_ratio=0.3)], popmm.PopConfig())

"""An FFN of several tokens that choose their channels together, and read each row once."""

import pytest
import torch
import torch.nn.functional as F

from popmm import kernels
from popmm.kernels import native, operators, planes
from popmm.method.tiers import assign, together

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")
TIERS = {"three": ((8, 5), (6, 20), (4, 31)), "one": ((6, 40),), "all": ((8, 150),), "few bits": ((7, 9), (3, 60))}


def ffn(tiers, d=128, d_ff=150):
    generator = torch.Generator().manual_seed(0)
    base = planes.base_of(tiers[0][0])
    parts = [planes.encode(torch.randn(d_ff, d, generator=generator), base) for _ in range(3)]
    rms, norms = (torch.rand(d_ff, generator=generator) + 0.1 for _ in range(2))
    biases = [torch.randn(d_ff, generator=generator) for _ in range(2)]
    return parts, rms, norms, biases, kernels.TiersFFN(parts, d_ff, rms, norms, biases, "silu", tiers)


@needs_compiler
@pytest.mark.parametrize("tiers", TIERS.values(), ids=TIERS)
@pytest.mark.parametrize("n", [2, 3, 9])
def test_all_read_the_rows_that_they_choose_together(tiers, n):
    parts, rms, norms, biases, whole = ffn(tiers)
    base, d_ff = planes.base_of(tiers[0][0]), len(rms)
    generator = torch.Generator().manual_seed(1)
    x, votes = torch.randn(n, 128, generator=generator), torch.rand(n, generator=generator)
    votes[0] = 0.0
    y, index = whole(torch.zeros(n, dtype=torch.int64), x, votes)
    assert (index == index[:1]).all()
    rows = torch.arange(d_ff).expand(n, -1)
    g = {b: native.planes_dot(parts[0], b, rows, x) + biases[0] for b in parts[0].precisions}
    u = {b: native.planes_dot(parts[1], b, rows, x) + biases[1] for b in parts[0].precisions}
    score = together((F.silu(g[base]) * rms).abs() * norms, votes)
    assert (score[0] >= 0).all() and float(score.sum()) == pytest.approx(float(votes.sum()), rel=1e-4)
    expected, place = torch.zeros(n, 128), 0
    for (bits, count), chosen in zip(tiers, assign(score, tiers)):
        mine, place = index[0, place : place + count], place + count
        torch.testing.assert_close(score[0, mine].sort()[0], score[0, chosen[0]].sort()[0], rtol=1e-3, atol=1e-7)
        h = (F.silu(g[bits]) * u[bits])[:, mine]
        expected += native.planes_add(parts[2], bits, mine.expand(n, -1), h)
    torch.testing.assert_close(y, expected, atol=2e-2 * float(expected.abs().max()), rtol=1e-3)
    if operators.available():
        torch.testing.assert_close(whole.step(x, votes=votes), y)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_order_of_the_tokens_and_the_number_of_threads_change_nothing(threads):
    *_, whole = ffn(TIERS["three"])
    x, votes, first = torch.randn(5, 128), torch.ones(5), torch.zeros(5, dtype=torch.int64)
    before = torch.get_num_threads()
    y, index = whole(first, x, votes)
    try:
        torch.set_num_threads(threads)
        turned, places = whole(first, x.flip(0), votes)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(places, index)
    torch.testing.assert_close(turned.flip(0), y, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_one_token_chooses_as_it_does_alone():
    *_, whole = ffn(TIERS["three"])
    x, first = torch.randn(1, 128), torch.zeros(1, dtype=torch.int64)
    for own, together_ in zip(whole(first, x), whole(first, x, torch.ones(1))):
        assert torch.equal(own, together_)


@needs_compiler
def test_votes_must_fit():
    *_, whole = ffn(TIERS["three"])
    x, first = torch.randn(2, 128), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="votes"):
        whole(first, x, torch.ones(3))
    if operators.available():
        with pytest.raises(RuntimeError, match="votes"):
            whole.step(x, votes=torch.ones(3))
        with pytest.raises(RuntimeError, match="votes"):
            whole.step(x, first, votes=torch.ones(2))

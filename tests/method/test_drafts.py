"""Which drafted tokens stand, and how many to draft."""

import pytest
import torch

from popmm.method.drafts import Pace, accepted, choose, expected, noise_like


def test_noise_is_what_multinomial_draws():
    """The very tokens that sampling without drafts gives; if a version draws otherwise, their distribution stays."""
    scores = torch.randn(1, 257, generator=torch.Generator().manual_seed(0))
    for seed in range(50):
        torch.manual_seed(seed)
        plain, after = torch.multinomial(scores.softmax(-1), 1).squeeze(1), torch.rand(1)
        torch.manual_seed(seed)
        ours = choose(scores, noise_like(scores))
        assert torch.equal(ours, plain) and torch.equal(torch.rand(1), after)


def test_the_distribution_of_what_stands():
    """20,000 rounds: the next token is the model's whatever drafted it (chi-squared, 11 degrees of freedom)."""
    torch.manual_seed(0)
    n, vocabulary = 20_000, 12
    target, draft = torch.randn(vocabulary), torch.randn(vocabulary)
    noise = torch.empty(n, vocabulary).exponential_()
    drafted, chosen = choose(draft.expand(n, -1), noise), choose(target.expand(n, -1), noise)
    stands = drafted == chosen
    token = torch.where(stands, drafted, chosen)
    counts, wanted = token.bincount(minlength=vocabulary).double(), target.double().softmax(-1) * n
    assert float(((counts - wanted) ** 2 / wanted).sum()) < 31.3  # p = 0.001
    overlap = float(torch.minimum(target.softmax(-1), draft.softmax(-1)).sum())
    assert overlap / (2 - overlap) <= float(stands.double().mean()) <= overlap + 0.01


@pytest.mark.parametrize("drafted, chosen, stood", [([1, 2, 3], [1, 2, 3, 4], 3), ([1, 9, 3], [1, 2, 3, 4], 1)])
def test_a_token_stands_if_all_before_it_do(drafted, chosen, stood):
    assert int(accepted(torch.tensor(drafted), torch.tensor(chosen))) == stood
    assert int(accepted(torch.tensor([], dtype=torch.int64), torch.tensor([5]))) == 0


def test_tokens_of_a_round():
    assert expected(1.0, 4) == 5 and expected(0.0, 4) == 1
    assert expected(0.5, 2) == pytest.approx(1.75)


def simulate(rate, dense, draft, verify, tokens=400, pace=None):
    """Seconds per token by a pace, where passes cost what is given, against the dense step."""
    generator = torch.Generator().manual_seed(0)
    pace = pace or Pace()
    pace.begin()
    spent = made = 0
    while made < tokens:
        width = pace.width()
        stood = 0
        while stood < width and float(torch.rand((), generator=generator)) < rate:
            stood += 1
        spent += width * draft + (verify if width else dense)
        made += stood + 1
        if width:
            pace.drafted(width, stood)
            pace.took(stood + 1, draft=(width, width * draft), verify=(width + 1, verify))
        else:
            pace.took(1, dense=dense)
    return spent / made / dense


def test_drafts_where_they_pay_and_not_where_they_do_not():
    assert simulate(0.95, 1.0, 0.3, 1.1) < 0.6
    assert simulate(0.9, 1.0, 0.5, 1.1) < 0.82
    for rate, draft, verify in [(0.2, 0.5, 1.1), (0.9, 1.0, 1.2), (0.5, 0.6, 1.3), (0.8, 0.3, 3.0)]:
        assert simulate(rate, 1.0, draft, verify) < 1.05


@pytest.mark.parametrize("rate", [0.0, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("draft, verify", [(0.4, 1.2), (0.9, 1.1), (0.4, 3.0)])
def test_no_text_is_much_slower_than_dense(rate, draft, verify):
    for tokens, most in ((16, 1.3), (64, 1.1), (128, 1.07)):
        assert simulate(rate, 1.0, draft, verify, tokens=tokens) < most


def test_a_pace_learns_from_text_to_text():
    pace = Pace()
    first = simulate(0.3, 1.0, 0.4, 1.1, tokens=60, pace=pace)
    for _ in range(5):
        last = simulate(0.3, 1.0, 0.4, 1.1, tokens=60, pace=pace)
    assert last <= first and last < 1.05


def test_a_fixed_number():
    pace = Pace(3)
    assert pace.width() == 3
    pace.drafted(3, 0)
    assert pace.width() == 3

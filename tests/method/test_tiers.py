"""Sizes of tiers keep to the bytes that they are given."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from popmm.method.tiers import FEW_BYTES, assign, bits_read, tier_sizes


@given(st.integers(64, 20000), st.floats(0.12, 0.51), st.sampled_from([16, 32, 64]))
def test_tiers_read_the_share_they_are_given(d_ff, share, group):
    sizes = tier_sizes(d_ff, share, group)
    base = 3 if share < FEW_BYTES[3] else 4
    assert [b for b, _ in sizes.tiers] == [b for b in (base + 4, base + 2, base) if b in dict(sizes.tiers)]
    assert sum(n for _, n in sizes.tiers) == sizes.budget <= d_ff and sizes.read == d_ff and not sizes.is_dense
    # by hand: the first plane of all gate rows, the rest of the gate and up and down at each tier's bits
    bits = d_ff * (base + 16 / group) + sum(n * (b - base + 2 * (b + 16 / group)) for b, n in sizes.tiers)
    assert bits_read(sizes, group) == pytest.approx(bits / d_ff)
    everything = d_ff * 3 * (8 + 16 / group)
    slack = 3 * (8 + 16 / group) * 1.5  # a channel or so
    assert abs(bits - min(share * 48 * d_ff, everything)) <= slack or sizes.budget == d_ff


def test_plain_quantisation_chooses_nothing():
    for bits in (8, 7, 6, 5, 4, 3):
        sizes = tier_sizes(100, 0.3, 64, weight_bits=bits)
        assert sizes.tiers == ((bits, 100),) and bits_read(sizes, 64) == pytest.approx(3 * (bits + 0.25))


@pytest.mark.parametrize("weight_bits", [None, 4])
def test_all_of_the_bytes_is_the_dense_ffn(weight_bits):
    assert tier_sizes(100, 1.0, 64, weight_bits).is_dense


def test_fewer_bytes_than_the_gate_takes_are_refused():
    with pytest.raises(ValueError, match=r"6.8% of the FFN's bytes at 16 bits.*may read 6.0%: give bytes=0.09 or more"):
        tier_sizes(1000, 0.06, 64)


def test_tiers_go_by_score_and_ties_to_the_lower_channel():
    score = torch.tensor([[3.0, 1.0, 3.0, 2.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    places = assign(score, ((8, 1), (6, 2), (4, 2)))
    assert [p.tolist() for p in places] == [[[0], [5]], [[2, 3], [3, 4]], [[1, 4], [1, 2]]]


@pytest.mark.parametrize("share", [0.15, 0.2, 0.25, 0.266, 0.3, 0.36, 0.45])
def test_two_matrices_read_their_share_in_the_tiers_of_three(share):
    d_ff, group = 4000, 64
    two = tier_sizes(d_ff, share, group, matrices=2)
    assert bits_read(two, group) / 32 == pytest.approx(share, abs=1e-3)
    # the gated FFN that reads as many channels in as many bits, if it has the same first plane
    gated = bits_read(two, group) + sum(n * (b + 16 / group) for b, n in two.tiers) / d_ff
    three = tier_sizes(d_ff, gated / 48, group)
    if three.base == two.base:
        for (bits, n), (same, other) in zip(two.tiers, three.tiers):
            assert bits == same and abs(n - other) <= 4

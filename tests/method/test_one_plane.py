"""Sizes of tiers where gate and up lie in one plane."""

import pytest

from popmm.method.one_plane import OnePlaneSizes, bits_read, one_plane_sizes
from popmm.method.tiers import TierSizes


@pytest.mark.parametrize("share", [0.12, 0.167, 0.2, 0.25, 0.266, 0.3, 0.328, 0.34])
@pytest.mark.parametrize("d_ff, group", [(1000, 64), (96, 16)])
def test_what_is_read_is_the_share_of_the_bytes(share, d_ff, group):
    sizes = one_plane_sizes(d_ff, share, group)
    own = 4 + 16 / group
    bits = own * d_ff + sum(n * (own + b + 16 / group) for b, n in sizes.tiers)
    assert bits_read(sizes, group) == pytest.approx(bits / d_ff)
    assert bits / d_ff / 48 == pytest.approx(share, abs=24 / 48 / d_ff) or sizes.tiers == ((8, d_ff),)
    assert sizes.base == 4 and sizes.budget == sum(n for _, n in sizes.tiers)


def test_beyond_what_came_nothing_more_is_read():
    for share in (0.35, 0.5, 0.9):
        assert one_plane_sizes(1000, share, 64).tiers == ((8, 1000),)
    assert bits_read(one_plane_sizes(1000, 0.9, 64), 64) == pytest.approx(2 * 4.25 + 8.25)


def test_all_channels_alike():
    for bits in (8, 6, 4):
        sizes = one_plane_sizes(100, 0.3, 64, weight_bits=bits)
        assert isinstance(sizes, OnePlaneSizes) and bits_read(sizes, 64) == pytest.approx(2 * 4.25 + bits + 0.25)
    assert not isinstance(one_plane_sizes(100, 0.3, 64, weight_bits=7), OnePlaneSizes)
    assert isinstance(one_plane_sizes(100, 0.3, 64, weight_bits=7), TierSizes)
    assert one_plane_sizes(100, 1.0, 64).is_dense


def test_too_few_bytes_for_the_gate_are_refused():
    with pytest.raises(ValueError, match="came in 4 bits.*give bytes=0.11 or more"):
        one_plane_sizes(1000, 0.08, 64)

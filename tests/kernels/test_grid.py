"""Weights that came in 4 bits: found by their values, and kept in one plane."""

import pytest
import torch

from popmm import kernels
from popmm.kernels import native, planes
from popmm.kernels.grid import encode_grid, on_grid

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")
TYPES = {torch.float32: 1e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # and how far off rounding puts them


def weights(rows=40, d=256, group=64, low=-8, high=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    step = (torch.rand(rows, d // group, 1, generator=generator) * 0.02 + 0.001).half().float()
    sign = torch.randint(0, 2, step.shape, generator=generator) * 2 - 1
    code = torch.randint(low, high + 1, (rows, d // group, group), generator=generator)
    return (code * step * sign).flatten(1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("low, high", [(-8, 7), (-7, 7), (-3, 5), (0, 1), (0, 0)])
def test_codes_are_found_again_from_the_values(low, high, dtype):
    w = weights(low=low, high=high).to(dtype)
    assert on_grid(w)
    found = encode_grid(w)
    assert found.d == 256 and found.precisions == (4,) and found.bytes() * 8 == 4.25 * w.numel()
    for bits in (4, 6, 8):  # whatever is asked
        held = planes.decode(found, bits)
        assert (held - w.float()).norm() <= TYPES[dtype] * w.float().norm()
        assert torch.equal(kernels.planes_decode(found, bits, torch.float32), held)


def test_a_step_that_serves_two_groups_is_found_in_each():
    assert on_grid(weights(group=128)) and on_grid(weights(group=256))


@pytest.mark.parametrize("group", [32, 16])
def test_groups_smaller_than_ours_are_on_no_grid(group):
    assert not on_grid(weights(group=group))


def test_other_codebooks_are_on_no_grid():
    generator = torch.Generator().manual_seed(0)
    code = torch.randint(0, 16, (40, 4, 64), generator=generator)
    zero_points = (code - torch.randint(3, 6, (40, 4, 1), generator=generator)) * 0.01
    int8 = torch.randint(-127, 128, (40, 256), generator=generator) * 0.001
    for w in (zero_points.flatten(1), int8, torch.randn(40, 256, generator=generator)):
        assert not on_grid(w)
        with pytest.raises(ValueError, match="4-bit grid"):
            encode_grid(w)


def test_one_row_beside_the_grid_is_seen():
    w = weights(rows=200)
    w[157, 3] += 0.3 * w[157, :64].abs().max() / 7
    assert not on_grid(w)


@needs_compiler
@pytest.mark.parametrize("d", [64, 192, 48])
def test_products_read_one_plane_whatever_is_asked(d):
    rows = encode_grid(weights(24, d, group=d))
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, 24, (3, 5), generator=generator)
    x, h = torch.randn(3, d, generator=generator), torch.randn(3, 5, generator=generator)
    for bits in (4, 8):
        for ours, twin in (
            (native.planes_dot(rows, bits, index, x), planes.dot(rows, 4, index, x)),
            (native.planes_add(rows, bits, index, h), planes.add(rows, 4, index, h)),
        ):
            torch.testing.assert_close(ours, twin, rtol=0, atol=0.02 * twin.abs().max().item())


@needs_compiler
@pytest.mark.parametrize("tiers", [((8, 3), (6, 4), (4, 6)), ((8, 24),), ((6, 24),), ((8, 5),)], ids=str)
@pytest.mark.parametrize("d", [64, 48])
def test_a_whole_ffn_of_one_plane_is_that_of_products_in_four_bits(tiers, d):
    parts = [encode_grid(weights(24, d, group=d, seed=seed)) for seed in range(2)]
    parts.append(planes.encode(torch.randn(24, d, generator=torch.Generator().manual_seed(2))))
    generator = torch.Generator().manual_seed(3)
    rms, norms, x = (torch.rand(n, generator=generator) for n in (24, 24, 2 * d))
    x = x.view(2, d) - 0.5
    run = kernels.TiersFFN(parts, 24, rms, norms, (None, None), "silu", tiers)
    y, index = run(torch.zeros(2, dtype=torch.int64), x)
    g, u = (planes.decode(part, 4) for part in parts[:2])
    for t in range(2):
        h = torch.nn.functional.silu(g @ x[t]) * (u @ x[t])
        expected, at = torch.zeros(d), 0
        for bits, n in tiers:
            mine, at = index[t, at : at + n], at + n
            expected += h[mine] @ planes.decode(parts[2], bits)[mine]
        torch.testing.assert_close(y[t], expected, rtol=0, atol=0.03 * expected.abs().max().item())
        if run.steps:
            torch.testing.assert_close(run.step(x[t : t + 1])[0], y[t], rtol=1e-5, atol=1e-6)

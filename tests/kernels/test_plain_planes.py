"""Rows that are read in one precision alone are rounded for it: what a plain quantiser makes, in planes."""

import pytest
import tiny
import torch
from matrix import MODELS, generate

import popmm
from popmm import kernels
from popmm.kernels import planes

BITS = (8, 7, 6, 5, 4, 3)
NONE = torch.empty(24, 0, dtype=torch.uint8)


def rows(n=24, d=192, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.rand(n, 1, generator=generator)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("d", [192, 64, 40])
def test_they_are_a_plain_quantisers(bits, d):
    w = rows(d=d)
    found = planes.decode(planes.encode_plain(w, bits), planes.plainly(bits))
    group = planes.encode_plain(w, bits).group
    torch.testing.assert_close(found, planes.rounded(w, bits, group), rtol=1e-3, atol=1e-3 * float(w.abs().max()))


@pytest.mark.parametrize("bits", [8, 6])
def test_zeros_and_weights_on_a_grid_stay_where_they_are(bits):
    w = torch.randint(-7, 8, (16, 128), generator=torch.Generator().manual_seed(1)).float() * 0.03125
    w[:, ::64] = -0.25  # so that the groups' steps are the grid's
    found = planes.decode(planes.encode_plain(w, bits), planes.plainly(bits))
    assert torch.equal(found, w)
    assert not torch.equal(planes.decode(planes.encode(w), bits), w)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("d", [192, 40])
def test_kernels_read_them_as_the_twin_does(bits, d):
    made, how = planes.encode_plain(rows(d=d), bits), planes.plainly(bits)
    index = torch.tensor([[3, 0, 23, 7, 7]])
    x, h = torch.randn(1, d), torch.randn(1, 5)
    expected = planes.dot(made, how, index, x)
    size = planes.decode(made, how).abs().amax()
    torch.testing.assert_close(kernels.planes_dot(made, how, index, x), expected, rtol=0.02, atol=float(0.05 * size))
    torch.testing.assert_close(
        kernels.planes_add(made, how, index, h), planes.add(made, how, index, h), rtol=0.02, atol=float(0.05 * size)
    )
    torch.testing.assert_close(kernels.planes_decode(made, how), planes.decode(made, how))
    linear = kernels.PlanesLinear(made, how)(x)
    torch.testing.assert_close(linear, x @ planes.decode(made, how).mT, rtol=0.02, atol=float(0.05 * size))


def test_no_plane_is_held_that_is_not_read():
    held = [planes.encode_plain(rows(), bits).bytes() for bits in (8, 6, 4)]
    assert [round(8 * n / rows().numel(), 2) for n in held] == [8.25, 6.25, 8.25]
    assert planes.encode_plain(rows(), 6).precisions == (6, 4)


@pytest.mark.parametrize("made", [planes.encode_plain(rows(), 6), planes.encode(rows())._replace(finest=NONE)])
def test_kernels_refuse_bits_that_are_not_there(made):
    if not kernels.serves_planes(made):
        pytest.skip("no C compiler")
    with pytest.raises(TypeError, match="bits=24"):
        kernels.PlanesLinear(made, planes.plainly(8))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-moe"])
@pytest.mark.parametrize("bits", [8, 6, 5])
def test_models_at_so_many_bits_are_those_of_rounded_weights(name, bits):
    model, inputs = MODELS[name].build(), {"input_ids": tiny.prompt(12)}
    dense = generate(model, inputs)[1]
    with popmm.pruned(model, weight_bits=bits, rest_bits=bits) as state:
        found = generate(model, inputs)[1]
        assert state.passes["decode"] == 3
    worse = {8: 0.03, 6: 0.1, 5: 0.2}[bits]
    assert (found - dense)[1:].norm() <= worse * dense[1:].norm()

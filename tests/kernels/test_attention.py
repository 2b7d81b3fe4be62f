"""Attention of a few queries per head against torch's, over caches of any strides and masks of any form."""

import pytest
import torch
import torch.nn.functional as F

from popmm.kernels import operators

pytestmark = pytest.mark.skipif(not operators.available(), reason="no C++ compiler")


def masks(kind, batch, heads, n, tokens, dtype, generator):
    keep = torch.rand(batch, 1, n, tokens, generator=generator) < 0.6
    keep[..., 0] = True
    return {
        "none": None,
        "bool": keep,
        "shared": keep[:1],
        "expanded": keep.expand(batch, heads, n, tokens),
        "added": torch.where(
            keep, torch.randn(batch, heads, n, tokens, generator=generator), torch.finfo(dtype).min
        ).to(dtype),
        "infinite": torch.where(keep, 0.0, -torch.inf).to(dtype),
    }[kind]


@pytest.mark.parametrize("mask", ["none", "bool", "shared", "expanded", "added", "infinite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "batch, heads, shared, tokens, d, d_value", [(1, 9, 3, 37, 64, 64), (3, 4, 4, 1, 16, 24), (2, 4, 1, 130, 80, 80)]
)
@pytest.mark.parametrize("n", [1, 5])
def test_it_is_scaled_dot_product_attention(mask, dtype, batch, heads, shared, tokens, d, d_value, n):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, n, d, generator=generator).to(dtype)
    # a cache that is longer than what is read, and one that lies by tokens first
    k = torch.randn(batch, shared, tokens + 5, d, generator=generator).to(dtype)[:, :, :tokens]
    v = torch.randn(batch, tokens, shared, d_value, generator=generator).to(dtype).transpose(1, 2)
    own = masks(mask, batch, heads, n, tokens, dtype, generator)
    found = operators.attend(q, k, v, own, 0.3)
    wide = None if own is None else own if own.dtype == torch.bool else own.float()
    repeat = [t.float().repeat_interleave(heads // shared, dim=1) for t in (k, v)]
    expected = F.scaled_dot_product_attention(q.float(), *repeat, attn_mask=wide, scale=0.3).transpose(1, 2)
    assert found.shape == (batch, n, heads, d_value) and found.dtype == dtype
    rounding = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(found.float(), expected, atol=rounding, rtol=rounding)


def test_tokens_that_are_left_out_are_not_read():
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 5, 16)
    keep = torch.tensor([True, True, False, True, False]).view(1, 1, 1, 5)
    spoilt = k.clone()
    spoilt[:, :, ~keep.flatten()] = torch.nan
    assert torch.equal(operators.attend(q, spoilt, spoilt, keep, 1.0), operators.attend(q, k, k, keep, 1.0))
    assert operators.attend(q, k, k, torch.zeros(1, 1, 1, 5, dtype=torch.bool), 1.0).eq(0).all()


@pytest.mark.parametrize(
    "change", [dict(k=(1, 2, 5, 8)), dict(v=(1, 2, 4, 16)), dict(k=(1, 3, 5, 16), v=(1, 3, 5, 16))]
)
def test_what_does_not_go_together_is_refused(change):
    shapes = {"q": (1, 2, 1, 16), "k": (1, 2, 5, 16), "v": (1, 2, 5, 16), **change}
    with pytest.raises(RuntimeError, match="do not go together"):
        operators.attend(*(torch.randn(*shape) for shape in shapes.values()), None, 1.0)


def test_a_mask_of_other_keys_is_refused():
    t = torch.randn(1, 2, 5, 16)
    with pytest.raises(RuntimeError, match="mask"):
        operators.attend(t[:, :, :1], t, t, torch.ones(1, 1, 1, 4, dtype=torch.bool), 1.0)


def test_a_query_does_not_depend_on_those_beside_it():
    q, t = torch.randn(1, 4, 7, 64).bfloat16(), torch.randn(1, 2, 39, 64).bfloat16()
    keep = torch.ones(7, 39).tril(32).bool().view(1, 1, 7, 39)
    together = operators.attend(q, t, t, keep, 0.1)
    alone = [operators.attend(q[:, :, i : i + 1], t, t, keep[:, :, i : i + 1], 0.1) for i in range(7)]
    assert torch.equal(torch.cat(alone, dim=1), together)

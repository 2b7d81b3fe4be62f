"""An FFN in two calls against the same FFN at one."""

import pytest
import torch
import torch.nn.functional as F

from popmm.engines.split import SplitFFN, laid_out, sizes_of
from popmm.method.activations import ACTIVATIONS
from popmm.method.ffn import FFNWeights
from popmm.method.tiers import bits_read

D_MODEL, D_FF = 64, 160
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


def weights(device="cpu", bias=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(D_FF, D_MODEL, generator=g, dtype=torch.float32) * 0.2 for _ in range(2))
    down = torch.randn(D_MODEL, D_FF, generator=g, dtype=torch.float32) * 0.2
    biases = [torch.randn(D_FF, generator=g, dtype=torch.float32) * 0.2 for _ in range(2)] if bias else [None, None]
    return FFNWeights(*(None if t is None else t.to(device) for t in (gate, up, down, *biases)))


def tokens(n, device="cpu"):
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(device)


def split(w, activation="silu", share=0.28, told=True, **how):
    ffn = SplitFFN("mlp", share, **how)
    biases = None if w.gate_bias is None else torch.cat([w.gate_bias, w.up_bias])
    ffn.hold("gate_up", torch.cat([w.gate, w.up]), biases)
    ffn.hold("down", w.down, None)
    if told:
        x = tokens(6, w.gate.device)
        gate_up = F.linear(x, torch.cat([w.gate, w.up]), biases)
        ffn.saw(gate_up)
        ffn.tell(ACTIVATIONS[activation](gate_up[:, :D_FF]) * gate_up[:, D_FF:])
        assert ffn.activation == activation and ffn.ready and ffn.settled
    return ffn


def run(ffn, x, activation="silu"):
    gate_up = ffn.gate_up(x)
    h = ACTIVATIONS[activation](gate_up[:, : gate_up.shape[1] // 2]) * gate_up[:, gate_up.shape[1] // 2 :]
    return gate_up, h, ffn.down(h)


def at_one_call(w, x, activation, share, votes=None, weight_bits=None):
    def combine(g, u):
        return ACTIVATIONS[activation](g) * u

    sizes, several = (sizes_of("mlp", D_FF, D_MODEL, share, weight_bits, tokens) for tokens in (1, 2))
    layout = laid_out("mlp", sizes, {2: several}, w, combine)
    return layout.decode(x, combine, votes=votes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("how", [dict(share=0.28), dict(share=0.19), dict(share=0.5, weight_bits=6)], ids=str)
def test_two_calls_are_one_ffn(activation, bias, how, device):
    w, x = weights(device, bias), tokens(3, device)
    expected, index = at_one_call(w, x, activation, **how)
    gate_up, h, y = run(split(w, activation, together=False, **how), x, activation)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2 * float(expected.std()))
    read = torch.zeros_like(h, dtype=torch.bool).scatter_(1, index, True)
    assert not gate_up[:, :D_FF][~read].any() and not gate_up[:, D_FF:][~read].any() and not h[~read].any()


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_choose_together_or_each_for_itself(device):
    w, x = weights(device), tokens(4, device)
    expected, index = at_one_call(w, x, "silu", 0.28, votes=torch.ones(4, dtype=torch.float32, device=device))
    _, h, y = run(split(w), x)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2 * float(expected.std()))
    read = h != 0
    assert (read == read[:1]).all() and len(set(index[0].tolist())) == int(read[0].sum())
    apart = split(w, together=False)
    alone = torch.cat([run(apart, row[None])[2] for row in x])
    torch.testing.assert_close(run(apart, x)[2], alone)
    assert not torch.allclose(alone, y, atol=1e-3)


def test_halves_of_a_layer_choose_among_their_own_channels():
    """Tensor parallelism: each rank has a part of the channels, and the sum of their answers is the layer's."""
    w, x, half = weights(), tokens(1), D_FF // 2
    ranks = [FFNWeights(w.gate[own], w.up[own], w.down[:, own]) for own in (slice(half), slice(half, None))]
    parts = [split_ranked(rank, x) for rank in ranks]
    dense = F.linear(F.silu(F.linear(x, w.gate)) * F.linear(x, w.up), w.down)
    whole = run(split(w), x)[2]
    off, alone = ((y - dense).norm() / dense.norm() for y in (sum(parts), whole))
    assert off < 1.5 * alone < 0.5


def split_ranked(w, x):
    ffn = SplitFFN("mlp", 0.28)
    ffn.hold("down", w.down, None)  # in either order
    ffn.hold("gate_up", torch.cat([w.gate, w.up]), None)
    ffn.activation = "silu"
    return run(ffn, x)[2]


def test_bytes_are_what_was_asked_for():
    assert bits_read(split(weights(), share=0.266).layout.sizes, 64) / 48 == pytest.approx(0.266, abs=0.005)


@pytest.mark.parametrize("replaces", [False, True])
def test_what_is_no_ffn_stays_dense_and_says_so(replaces):
    w = weights()
    ffn = split(w, told=False, replaces=replaces)
    assert not ffn.ready and not ffn.settled
    ffn.tell(tokens(2))  # of a pass that gate and up did not see
    ffn.saw(torch.zeros(2, 2 * D_FF, dtype=torch.float32))
    ffn.tell(torch.zeros(2, D_FF, dtype=torch.float32))  # tells nothing
    assert not ffn.settled
    gate_up = F.linear(tokens(6), torch.cat([w.gate, w.up]))
    ffn.saw(gate_up)
    ffn.tell(gate_up[:, :D_FF] + gate_up[:, D_FF:])
    assert not ffn.ready and ffn.settled and "none of silu" in ffn.left_dense
    assert (ffn.layout is None) == (not replaces)


def test_planes_hold_the_weights_for_prompts():
    w = weights()
    ffn = split(w, replaces=True)
    for own, held in ((torch.cat([w.gate, w.up]), "gate_up"), (w.down, "down")):
        found = ffn.all_of(held, torch.float32)
        assert found.shape == own.shape and (found - own).norm() / own.norm() < 0.02


def test_widths_that_cannot_be_quantised_are_refused():
    with pytest.raises(ValueError, match="d_model=24.*groups of 16"):
        sizes_of("mlp", 64, 24, 0.3, None)
    with pytest.raises(ValueError, match="give bytes=0.09 or more"):
        sizes_of("mlp", 64, 64, 0.05, None)

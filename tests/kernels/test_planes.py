"""Nested planes: coding by loops, products against it, whole FFNs against the same made of single products."""

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from popmm import kernels
from popmm.kernels import build, native, planes
from popmm.method.activations import ACTIVATIONS, recognised
from popmm.method.tiers import assign

needs_compiler = pytest.mark.skipif(build.library() is None, reason="no C compiler")
BITS = [3, 4, 5, 6, 7, 8]
SIZES = [(7, 64), (50, 576), (33, 1024), (12, 96), (9, 144), (5, 16)]  # rows, d: groups of 64, 32, 16


def matrix(n_rows, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_rows, d, generator=generator) * torch.randn(n_rows, 1, generator=generator).exp()


def value(p, row, i, bits):
    """One weight, by the format's description."""
    group, first = p.group, 3 if bits % 2 else 4
    g, at = divmod(i, group)
    place, shift = (g * group) // 4 + at % (group // 4), 2 * (at // (group // 4))
    if first == 4:
        byte = int(p.base[row, (g * group) // 2 + at % (group // 2)])
        u = byte & 15 if at < group // 2 else byte >> 4
    else:
        start = g * group * 3 // 8
        upper = int(p.base[row, start + at % (group // 4)]) >> shift & 3
        u = 2 * upper + (int(p.base[row, start + group // 4 + at // 8]) >> at % 8 & 1)
    if bits >= first + 2:
        u = 4 * u + (int(p.fine[row, place]) >> shift & 3)
    if bits >= first + 4:
        u = 4 * u + (int(p.finest[row, place]) >> shift & 3)
    step = 2 ** (bits - first)
    middle = 2 ** (first - 1) * step + (step - 1) / 2
    assert 0 <= i < p.d
    return float(p.scale[row, g]) * (u - middle) / step


@pytest.mark.parametrize("n_rows, d", [(3, 64), (2, 96), (2, 16)])
@pytest.mark.parametrize("bits", BITS)
def test_decoding_follows_the_format(n_rows, d, bits):
    p = planes.encode(matrix(n_rows, d), planes.base_of(bits))
    assert bits in p.precisions and p.d == d
    expected = [[value(p, row, i, bits) for i in range(d)] for row in range(n_rows)]
    torch.testing.assert_close(planes.decode(p, bits), torch.tensor(expected), atol=0, rtol=1e-6)


@pytest.mark.parametrize("n_rows, d", SIZES)
@pytest.mark.parametrize("base", planes.BASES)
def test_each_plane_halves_the_cell_twice(n_rows, d, base):
    w = matrix(n_rows, d)
    p = planes.encode(w, base)
    step = p.scale.float().abs().repeat_interleave(p.group, dim=1)
    inside = (
        (w / p.scale.float().repeat_interleave(p.group, dim=1)).clamp(-(2 ** (base - 1)) - 0.5, 2 ** (base - 1) - 0.5)
        * step
        * p.scale.float().sign().repeat_interleave(p.group, dim=1)
    )  # what is clipped is not the cell's fault
    for bits, half_cell in ((base, 0.5), (base + 2, 0.125), (base + 4, 0.03125)):
        error = (planes.decode(p, bits) - inside).abs() / step
        assert error.max() <= half_cell * 1.001
    clipped = (w - inside).norm() / w.norm()
    assert clipped < {4: 0.02, 3: 0.11}[base]


@pytest.mark.parametrize(
    "w", [torch.zeros(2, 64), torch.full((2, 64), 3.0), torch.eye(64)[:2] * 1e-6, torch.ones(1, 64) * 6e4]
)
def test_odd_groups_keep_their_size(w):
    p = planes.encode(w)
    assert torch.isfinite(planes.decode(p, 8)).all()
    assert (planes.decode(p, 8) - w).abs().max() <= 0.02 * w.abs().max() + 1e-6


def in_eight_bits(x, group):
    """What the C kernels make of a vector that rows are multiplied with."""
    parts = x.view(len(x), -1, group)
    step = parts.abs().amax(-1, keepdim=True) / 127
    return torch.where(step > 0, (parts / step).round() * step, 0).view_as(x)


@needs_compiler
@pytest.mark.parametrize("n_rows, d", SIZES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n, k", [(1, 1), (2, 5), (1, 18), (3, 4)])
def test_c_products_are_those_of_decoded_rows(n_rows, d, bits, n, k):
    generator = torch.Generator().manual_seed(k)
    p, index = (
        planes.encode(matrix(n_rows, d), planes.base_of(bits)),
        torch.randint(0, n_rows, (n, k), generator=generator),
    )
    x, h = torch.randn(n, d, generator=generator), torch.randn(n, k, generator=generator)
    rows = planes.decode(p, bits)[index]
    dot = torch.einsum("nkd,nd->nk", rows.double(), in_eight_bits(x, p.group).double())
    size = torch.einsum("nkd,nd->nk", rows.abs(), x.abs())  # rounding is of this size, whatever cancels
    assert ((native.planes_dot(p, bits, index, x) - dot).abs() <= 4e-3 * size).all()
    total = torch.einsum("nkd,nk->nd", rows.double(), h.double())
    found = native.planes_add(p, bits, index, h)
    assert (found - total).norm() <= (2e-2 if bits <= 4 else 1.5e-3) * total.norm()


@needs_compiler
@pytest.mark.parametrize("n_rows, d", SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_c_decodes_as_the_twin_does(n_rows, d, bits):
    p = planes.encode(matrix(n_rows, d), planes.base_of(bits))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(native.planes_decode(p, bits, dtype), planes.decode(p, bits).to(dtype))


@needs_compiler
def test_c_products_do_not_depend_on_the_number_of_threads():
    p, index = planes.encode(matrix(90, 576)), torch.arange(83).view(1, -1)
    x, h = torch.randn(1, 576), torch.randn(1, 83)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(
                [f(p, b, index, v) for b in (4, 8) for f, v in ((native.planes_dot, x), (native.planes_add, h))]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for own in found[1:] for a, b in zip(own, found[0]))


@needs_compiler
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(index=torch.tensor([[0, 7]])), ValueError, "index 7.*0 to 6"),
        (dict(index=torch.tensor([[-1]])), ValueError, "index -1"),
        (dict(x=torch.zeros(1, 63)), ValueError, r"give \(1, 64\)"),
        (dict(bits=5), TypeError, "4, 6 or 8 bits"),
        (dict(bits=9), TypeError, "4, 6 or 8 bits"),
        (dict(fine=torch.zeros(7, 8, dtype=torch.uint8)), TypeError, "planes.encode"),
        (dict(scale=torch.zeros(7, 1)), TypeError, "planes.encode"),
        (dict(base=torch.zeros(32, 7, dtype=torch.uint8).T), TypeError, "planes.encode"),
    ],
    ids=str,
)
def test_what_c_would_read_past_is_refused(change, error, message):
    p = planes.encode(matrix(7, 64))
    p = p._replace(**{k: v for k, v in change.items() if k in p._fields})
    x, index = change.get("x", torch.zeros(1, 64)), change.get("index", torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(error, match=message):
        native.planes_dot(p, change.get("bits", 4), index, x)


FFNS = list(itertools.product(ACTIVATIONS, [False, True], [(12, 64), (24, 96), (40, 576)], planes.BASES))


@needs_compiler
@pytest.mark.parametrize("activation, biased, size, base", FFNS, ids=str)
def test_a_whole_ffn_is_made_of_single_products(activation, biased, size, base):
    d_ff, d = size
    generator = torch.Generator().manual_seed(0)
    parts = [planes.encode(matrix(2 * d_ff, d, seed), base) for seed in range(3)]  # two experts
    rms, norms = torch.rand(2, d_ff, generator=generator), torch.rand(2, d_ff, generator=generator)
    biases = tuple(torch.randn(2, d_ff, generator=generator) for _ in range(2)) if biased else (None, None)
    tiers, first, x = (
        ((base + 4, 2), (base + 2, 3), (base, d_ff // 2)),
        torch.tensor([d_ff, 0, d_ff]),
        torch.randn(3, d, generator=generator),
    )
    y, index = kernels.TiersFFN(parts, d_ff, rms, norms, biases, activation, tiers)(first, x)
    two = [parts[0], None, parts[2]]
    without_gate, same = kernels.TiersFFN(two, d_ff, rms, norms, biases, activation, tiers)(first, x)
    assert torch.equal(same, index)
    act = ACTIVATIONS[activation]
    for t in range(3):
        own = slice(int(first[t]), int(first[t]) + d_ff)
        which = own.start // d_ff
        rows = torch.arange(own.start, own.stop).view(1, -1)
        bias = [torch.zeros(d_ff) if b is None else b[which] for b in biases]
        g = {b: native.planes_dot(parts[0], b, rows, x[t : t + 1])[0] + bias[0] for b in parts[0].precisions}
        u = {b: native.planes_dot(parts[1], b, rows, x[t : t + 1])[0] + bias[1] for b in parts[0].precisions}
        score = (act(g[base]) * rms[which]).abs() * norms[which]
        expected, alone, place = torch.zeros(d), torch.zeros(d), 0
        for (bits, n), chosen in zip(tiers, assign(score[None], tiers)):
            mine, place = index[t, place : place + n], place + n
            # the same channels, or others of nearly the same score
            torch.testing.assert_close(score[mine].sort()[0], score[chosen[0]].sort()[0], rtol=1e-4, atol=1e-5)
            assert mine.tolist() == sorted(set(mine.tolist()))
            h = (act(g[bits]) * u[bits])[mine][None]
            expected += native.planes_add(parts[2], bits, rows[0][mine][None], h)[0]
            alone += native.planes_add(parts[2], bits, rows[0][mine][None], act(g[bits])[mine][None])[0]
        torch.testing.assert_close(without_gate[t], alone, atol=1e-4 * alone.abs().max(), rtol=1e-4)
        torch.testing.assert_close(y[t], expected, atol=1e-4 * expected.abs().max(), rtol=1e-4)


@needs_compiler
def test_an_ffn_of_wrong_sizes_is_refused():
    parts = [planes.encode(matrix(24, 64, seed)) for seed in range(3)]
    good = dict(d_ff=12, rms=torch.ones(24), norms=torch.ones(24), biases=(None, None), activation="silu")
    good |= dict(tiers=((8, 2),), first=torch.tensor([0]), x=torch.zeros(1, 64))
    for change in (
        dict(d_ff=7),
        dict(rms=torch.ones(23)),
        dict(tiers=((8, 13),)),
        dict(tiers=((5, 3),)),
        dict(tiers=()),
        dict(first=torch.tensor([13])),
        dict(x=torch.zeros(1, 32)),
        dict(biases=(torch.ones(3), None)),
    ):
        with pytest.raises(ValueError):
            given = {**good, **change}
            first, x = given.pop("first"), given.pop("x")
            native.TiersFFN(parts, **given)(first, x)


def test_activations_are_known_by_their_values():
    cpu = torch.device("cpu")
    for name, act in ACTIVATIONS.items():
        assert recognised(lambda g, u, act=act: act(g) * u, cpu) == name
    assert recognised(lambda g, u: F.silu(g) * (u + 1), cpu) is None
    assert recognised(lambda g, u: 2 * F.silu(g) * u, cpu) is None
    assert recognised(lambda g, u: F.silu(g.clamp(max=7)) * u, cpu) is None


OTHER_PROCESSORS = """
import torch
from popmm import kernels
from popmm.kernels import native, planes
assert native.library() is not None
torch.manual_seed(0)
for n_rows, d in ((7, 64), (50, 576), (12, 96)):
    for bits in (3, 4, 5, 6, 7, 8):
        w = torch.randn(n_rows, d) * torch.randn(n_rows, 1).exp()
        p = planes.encode(w, planes.base_of(bits))
        rows = planes.decode(p, bits)
        assert torch.equal(native.planes_decode(p, bits, torch.float32), rows)
        index, x, h = torch.randint(0, n_rows, (2, 19)), torch.randn(2, d), torch.randn(2, 19)
        size = torch.einsum("nkd,nd->nk", rows[index].abs(), x.abs())
        assert ((native.planes_dot(p, bits, index, x) - planes.dot(p, bits, index, x)).abs() <= 1e-2 * size).all()
        total = planes.add(p, bits, index, h)
        assert (native.planes_add(p, bits, index, h) - total).norm() <= (2e-2 if bits <= 4 else 2e-3) * total.norm()
print("fine")
"""


@needs_compiler
@pytest.mark.parametrize("flags", ["-DPOPMM_AVX2", "-march=x86-64"])
def test_kernels_of_other_processors(flags):
    """What this processor would not choose: eight numbers at once, and one by one."""
    environment = {**os.environ, "POPMM_CFLAGS": flags}
    run = subprocess.run([sys.executable, "-c", OTHER_PROCESSORS], capture_output=True, text=True, env=environment)
    assert run.stdout == "fine\n", run.stderr


@needs_compiler
@pytest.mark.parametrize("distinct", [1, 2, 5, 40])
@pytest.mark.parametrize("counts", [(3, 7, 11), (0, 4, 30), (5, 0, 8), (40, 0, 0), (1, 1, 1)])
def test_equal_scores_go_to_the_lower_channels_in_c_too(distinct, counts):
    d_ff, d = 40, 64
    parts = [planes.encode(matrix(d_ff, d, seed)) for seed in range(3)]
    x = torch.randn(1, d)
    gate = native.planes_dot(parts[0], 4, torch.arange(d_ff)[None], x)[0]
    wanted = torch.randint(0, distinct, (d_ff,), generator=torch.Generator().manual_seed(1)).float()
    norms = torch.where(wanted > 0, wanted, 0)  # times a gate of size 1: scores that are equal to the bit
    rms = 1 / F.relu(gate).clamp_min(1e-30)
    score = (F.relu(gate) * rms).abs() * norms
    tiers = tuple((bits, n) for bits, n in zip((8, 6, 4), counts))
    _, index = native.TiersFFN(parts, d_ff, rms, norms, (None, None), "relu", tiers)(torch.tensor([0]), x)
    places = torch.cat(assign(score[None], tiers), dim=1)
    assert torch.equal(index, places)


TRITON = """
import torch
from popmm.kernels import planes, triton_planes as room
for n_rows, d in ((7, 64), (20, 192), (12, 96), (9, 144)):
    for bits in (3, 4, 5, 6, 7, 8):
        p = planes.encode(torch.randn(n_rows, d), planes.base_of(bits))
        for n, k in ((1, 1), (2, 5), (1, 37)):
            index, x, h = torch.randint(0, n_rows, (n, k)), torch.randn(n, d), torch.randn(n, k)
            close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
            close(room.planes_dot(p, bits, index, x), planes.dot(p, bits, index, x))
            close(room.planes_add(p, bits, index, h), planes.add(p, bits, index, h))
            close(room.PlanesLinear(p, bits)(x), x @ planes.decode(p, bits).T)
print("fine")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves are tested on the GPU")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_triton_kernels_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", TRITON], capture_output=True, text=True, env=environment)
    assert run.stdout == "fine\n", run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_triton_kernels_on_the_gpu():
    code = TRITON.replace("import torch\n", "import torch; torch.set_default_device('cuda')\n", 1)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "fine\n", run.stderr

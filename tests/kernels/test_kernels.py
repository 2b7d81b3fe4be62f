"""Kernels against float64, in odd sizes, strides and dtypes; Triton's under its interpreter where there is no GPU."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from popmm import kernels
from popmm.kernels import native, twin

GPU = torch.cuda.is_available()
SIZES = [(1, 7, 5, 1), (1, 33, 64, 33), (2, 70, 130, 41), (8, 200, 96, 200), (3, 129, 257, 64)]  # n, rows, d, k
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")


def rooms():
    yield pytest.param("twin", id="torch")
    yield pytest.param("native", id="c", marks=needs_compiler)
    yield pytest.param(
        "triton_rows", id="triton", marks=pytest.mark.skipif(not GPU, reason="run by the interpreter test")
    )


@pytest.fixture(params=rooms())
def room(request):
    return importlib.import_module(f"popmm.kernels.{request.param}")


def device_of(room):
    return "cuda" if room.__name__.endswith("triton_rows") and GPU else "cpu"


def poisoned(monkeypatch):
    """New memory holds NaN, so that an element that is not written shows."""
    plain = torch.empty

    def empty(*args, **kwargs):
        out = plain(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", empty)


def case(n, n_rows, d, k, dtype, strided, device):
    generator = torch.Generator().manual_seed(n + n_rows + d + k)
    wide = torch.randn(n_rows, d + 3 if strided else d, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(n_rows, generator=generator)[:k] for _ in range(n)])
    x, h = torch.randn(n, d, generator=generator), torch.randn(n, k, generator=generator)
    return [t.to(device) for t in (wide, index, x.to(dtype), h.to(dtype))], d


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_with_chosen_rows(room, size, dtype, strided, monkeypatch):
    (wide, index, x, h), d = case(*size, dtype, strided, device_of(room))
    rows = wide[:, :d]
    if room is native and not native.serves(rows):
        assert dtype == torch.float16
        return
    poisoned(monkeypatch)
    chosen = rows.double()[index]
    dot = torch.einsum("nkd,nd->nk", chosen, x.double())
    total = torch.einsum("nkd,nk->nd", chosen, h.double())
    torch.testing.assert_close(room.gather_dot(rows, index, x).double(), dot, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(room.gather_sum(rows, index, h).double(), total, atol=1e-4, rtol=1e-4)
    assert torch.equal(room.gather_sum(rows, index, h), room.gather_sum(rows, index, h))


def blocks(n, n_rows, d, n_matrices, dtype, strided, device):
    generator = torch.Generator().manual_seed(n + n_rows + d)
    wide = torch.randn(n_matrices, n_rows + 2, d + 3, generator=generator).to(dtype)
    matrices = wide[:, :n_rows, :d] if strided else wide[:, :n_rows, :d].contiguous()
    block = torch.randint(0, n_matrices, (n,), generator=generator)
    return matrices.to(device), torch.randn(n, d, generator=generator).to(device, dtype), block.to(device)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (1, 33, 64, 1), (2, 41, 130, 5), (8, 6, 257, 3)], ids=str)
def test_products_with_chosen_matrices(room, size, dtype, strided, monkeypatch):
    matrices, x, block = blocks(*size, dtype, strided, device_of(room))
    if room is native and not native.serves(matrices):
        assert dtype == torch.float16
        return
    poisoned(monkeypatch)
    expected = torch.einsum("nrd,nd->nr", matrices[block].double(), x.double())
    torch.testing.assert_close(room.block_dot(matrices, x, block).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n, n_rows, d, group", [(1, 7, 64, 64), (3, 33, 192, 64), (8, 20, 96, 32), (2, 9, 48, 16)])
def test_quantised_products(room, bits, n, n_rows, d, group, monkeypatch):
    torch.manual_seed(0)
    rows, x = torch.randn(n_rows, d), torch.randn(n, d)
    codes, scale = (t.to(device_of(room)) for t in twin.quantise(rows, bits, group))
    poisoned(monkeypatch)
    restored = twin.dequantise(codes, scale, bits, group).double()
    parts = rows.view(n_rows, -1, group)
    plain = parts.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    allowed = ((parts / plain).round() * plain - parts).square().sum(-1)
    error = (restored.cpu() - rows).view_as(parts).square().sum(-1)
    assert (error <= allowed * 1.2).all()  # scales are rounded to float16
    assert bits == 8 or error.sum() < 0.8 * allowed.sum()
    for blocks in (1, n_rows):  # all rows for every x, or one row each
        block = torch.arange(n, device=codes.device) % blocks
        found = room.quantised_dot(codes, scale, x.to(codes.device), bits, group, block, n_rows // blocks)
        expected = torch.einsum("nrd,nd->nr", restored.cpu().view(blocks, -1, d)[block.cpu()], x.double())
        torch.testing.assert_close(found.double().cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("module", [twin, pytest.param(native, marks=needs_compiler)])
@pytest.mark.parametrize("n, u, k", [(1, 1, 1), (3, 50, 1), (2, 50, 50), (4, 333, 100)])
@pytest.mark.parametrize("ties", [False, True])
def test_choosing_the_best(module, n, u, k, ties):
    torch.manual_seed(u)
    score = torch.randint(0, 5, (n, u)).float() if ties else torch.randn(n, u)
    expected = [sorted(sorted(range(u), key=lambda i: (-row[i], i))[:k]) for row in score.tolist()]
    assert module.choose(score, k).tolist() == expected


@pytest.mark.parametrize("module", [twin, pytest.param(native, marks=needs_compiler)])
def test_choosing_among_odd_scores(module):
    inf, nan = float("inf"), float("nan")
    score = torch.tensor([[0.0, -0.0, 1e-42, -inf, nan, inf, -1.0, -nan, 2.0, 0.0]])
    order = [4, 7, 5, 8, 2, 0, 1, 9, 6, 3]  # what is no number comes first, -0 is 0
    for k in range(1, 11):
        assert module.choose(score, k).tolist() == [sorted(order[:k])]


def arguments():
    """Rows, index, x, h, codes, scales and block of one token."""
    generator = torch.Generator().manual_seed(0)
    rows, x = torch.randn(12, 32, generator=generator), torch.randn(2, 32, generator=generator)
    index = torch.randint(0, 12, (2, 5), generator=generator)
    codes, scale = twin.quantise(rows, 4, 32)
    return dict(rows=rows, index=index, x=x, h=torch.randn(2, 5, generator=generator), codes=codes, scale=scale) | dict(
        block=torch.tensor([0, 2]), matrices=rows.view(3, 4, 32)
    )


CALLS = {
    "gather_dot": lambda room, a: room.gather_dot(a["rows"], a["index"], a["x"]),
    "gather_sum": lambda room, a: room.gather_sum(a["rows"], a["index"], a["h"]),
    "block_dot": lambda room, a: room.block_dot(a["matrices"], a["x"], a["block"]),
    "quantised_dot": lambda room, a: room.quantised_dot(a["codes"], a["scale"], a["x"], 4, 32, a["block"], 4),
}


def without_memory(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


REFUSED = [
    (
        "gather_dot",
        dict(index=lambda t: t.clone().index_fill_(1, torch.tensor(3), 12)),
        ValueError,
        "index 12.*0 to 11",
    ),
    ("gather_sum", dict(index=lambda t: t - 20), ValueError, "index -"),
    ("block_dot", dict(block=lambda t: t + 1), ValueError, "index 3.*0 to 2"),
    ("quantised_dot", dict(block=lambda t: t - 1), ValueError, "index -1.*0 to 2"),
    ("gather_dot", dict(index=lambda t: t.float()), TypeError, "index is float32"),
    ("gather_sum", dict(index=lambda t: t > 3), TypeError, "index is bool"),
    ("gather_dot", dict(index=lambda t: t[0]), ValueError, "give 2 dimensions"),
    ("block_dot", dict(block=lambda t: t[0]), ValueError, "give 1 dimensions"),
    ("gather_dot", dict(x=lambda t: t[:, :31]), ValueError, r"x is float32 \(2, 31\).*give \(2, 32\)"),
    ("gather_dot", dict(x=lambda t: t[:1]), ValueError, r"give \(2, 32\)"),
    ("gather_sum", dict(h=lambda t: t.T), ValueError, r"give \(2, 5\)"),
    ("block_dot", dict(x=lambda t: t.long()), TypeError, "x is int64"),
    ("quantised_dot", dict(x=lambda t: t[:, :16]), ValueError, r"give \(2, 32\)"),
    ("quantised_dot", dict(codes=lambda t: t.to(torch.int8)), TypeError, "codes are int8"),
    ("quantised_dot", dict(scale=lambda t: t.float()), TypeError, "scales float32"),
    ("quantised_dot", dict(scale=lambda t: t[:8]), ValueError, r"scales of shape \(8, 1\)"),
    ("quantised_dot", dict(codes=lambda t: t[:, :8]), ValueError, r"codes of shape \(12, 8\)"),
    ("quantised_dot", dict(codes=lambda t: t[:10], scale=lambda t: t[:10]), ValueError, "n_rows=4"),
    ("gather_dot", dict(rows=lambda t: t.double()), TypeError, "rows are float64"),
    ("gather_dot", dict(rows=lambda t: t.half()), TypeError, "rows are float16"),
    ("block_dot", dict(matrices=lambda t: t[0]), TypeError, "matrices are"),
    ("gather_sum", dict(rows=lambda t: t.T.contiguous().T), TypeError, "rows are"),
    ("gather_dot", dict(x=lambda t: t.to("meta")), ValueError, "on meta"),
    ("gather_dot", dict(rows=without_memory), ValueError, "no memory"),
    ("gather_sum", dict(h=without_memory), ValueError, "no memory"),
]


@needs_compiler
@pytest.mark.parametrize("name, changes, error, message", REFUSED)
def test_what_c_would_read_past_is_refused(name, changes, error, message):
    given = arguments()
    for argument, change in changes.items():
        given[argument] = change(given[argument])
    with pytest.raises(error, match=message):
        CALLS[name](native, given)


ODD = {
    "int32 index": dict(index=lambda t: t.int(), block=lambda t: t.int()),
    "index with gaps": dict(index=lambda t: t.T.contiguous().T, block=lambda t: t.repeat_interleave(2)[::2]),
    "one row many times": dict(rows=lambda t: t[3].expand(12, 32), matrices=lambda t: t[:1].expand(3, 4, 32)),
    "columns in one piece": dict(rows=lambda t: t.T.contiguous().T, matrices=lambda t: t.mT.contiguous().mT),
    "x with gaps": dict(x=lambda t: t.T.contiguous().T, h=lambda t: t.T.contiguous().T),
    "one x for all": dict(x=lambda t: t[:1].expand(2, 32), h=lambda t: t[:, :1].expand(2, 5)),
    "negated view": dict(rows=torch._neg_view, matrices=torch._neg_view, x=torch._neg_view, h=torch._neg_view),
    "codes with gaps": dict(codes=lambda t: t.T.contiguous().T, scale=lambda t: t.expand(12, 2)[:, :1]),
    "no token": dict(index=lambda t: t[:0], x=lambda t: t[:0], h=lambda t: t[:0], block=lambda t: t[:0]),
    "no row": dict(index=lambda t: t[:, :0], h=lambda t: t[:, :0]),
    "float64 x": dict(x=lambda t: t.double(), h=lambda t: t.double()),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", CALLS)
def test_odd_tensors_are_served(name, odd):
    given = arguments()
    for argument, change in ODD[odd].items():
        given[argument] = change(given[argument])
    asked = given["h" if name == "gather_sum" else "x"]
    found = CALLS[name](kernels, given)
    plain = {key: t.resolve_neg().clone(memory_format=torch.contiguous_format) for key, t in given.items()}
    plain = {key: t.long() if key in ("index", "block") else t for key, t in plain.items()}
    assert found.dtype == asked.dtype
    torch.testing.assert_close(found.float(), CALLS[name](twin, plain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("module", [twin, pytest.param(native, marks=needs_compiler)])
def test_no_more_than_there_are_can_be_chosen(module):
    score = torch.randn(2, 5)
    assert module.choose(score, 0).shape == (2, 0)
    assert module.choose(score[:0], 3).shape == (0, 3)
    assert torch.equal(module.choose(score.double().T.contiguous().T, 2), module.choose(score, 2))
    for k in (-1, 6):
        with pytest.raises(ValueError, match=f"k={k} highest"):
            module.choose(score, k)


@pytest.mark.parametrize("name", CALLS)
def test_results_keep_their_dtype_whatever_the_default(room, name):
    given = {key: t.to(device_of(room)) for key, t in arguments().items()}
    expected = CALLS[name](room, given)
    torch.set_default_dtype(torch.float64)  # a larger one: a buffer that took it would be read wrongly, not overrun
    try:
        found = CALLS[name](room, given)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_small_scales_count_where_denormal_numbers_do_not(room, bits):
    torch.manual_seed(0)
    x, block = torch.randn(2, 64), torch.zeros(2, dtype=torch.int64)
    codes, scale = twin.quantise(torch.randn(9, 64) * torch.logspace(-7, 2, 9)[:, None], bits, 64)
    given = [t.to(device_of(room)) for t in (codes, scale, x, block)]
    expected = room.quantised_dot(*given[:3], bits, 64, given[3], 9)
    plain = (x.double() @ twin.dequantise(codes, scale, bits, 64).double().T).float()
    torch.testing.assert_close(expected.cpu(), plain, rtol=1e-4, atol=1e-9)
    torch.set_flush_denormal(True)
    try:
        found = room.quantised_dot(*given[:3], bits, 64, given[3], 9)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CALLS)
def test_autocast_does_not_round_what_kernels_compute(room, name):
    given = {key: t.to(device_of(room)) for key, t in arguments().items()}
    expected = CALLS[name](room, given)
    with torch.autocast(device_of(room), torch.bfloat16):
        assert torch.equal(CALLS[name](room, given), expected)
        assert all(map(torch.equal, twin.quantise(arguments()["rows"], 4, 32), (given["codes"], given["scale"])))


def test_operators_compile_into_one_graph():
    (rows, index, x, h), _ = case(2, 40, 64, 9, torch.float32, False, "cpu")
    codes, scale = twin.quantise(rows, 4, 64)

    def everything(x, h):
        chosen = kernels.choose(kernels.quantised_dot(codes, scale, x, 4, 64, torch.zeros(2, dtype=torch.int64), 40), 9)
        return kernels.gather_dot(rows, chosen, x), kernels.gather_sum(rows, index, h)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(x, h), everything(x, h)):
        assert torch.equal(found, expected)


def test_switched_off_kernels_fall_back_to_torch():
    code = "from popmm.kernels import native; assert native.library() is None"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "POPMM_NATIVE": "0"})


@pytest.mark.skipif(GPU, reason="the kernels themselves are tested on the GPU")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_triton_kernels_under_the_interpreter():
    code = """
import torch, sys
sys.path[:0] = ["tests", "tests/kernels"]
import test_kernels as t
from popmm.kernels import triton_rows as room, twin
for size in t.SIZES:
    for dtype in t.DTYPES:
        for strided in (False, True):
            (wide, index, x, h), d = t.case(*size, dtype, strided, "cpu")
            rows = wide[:, :d]
            chosen = rows.double()[index]
            dot = torch.einsum("nkd,nd->nk", chosen, x.double())
            total = torch.einsum("nkd,nk->nd", chosen, h.double())
            torch.testing.assert_close(room.gather_dot(rows, index, x).double(), dot, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(room.gather_sum(rows, index, h).double(), total, atol=1e-4, rtol=1e-4)
for size in [(1, 1, 1, 1), (2, 41, 130, 5), (8, 6, 257, 3)]:
    for dtype in t.DTYPES:
        for strided in (False, True):
            matrices, x, block = t.blocks(*size, dtype, strided, "cpu")
            expected = twin.block_dot(matrices, x, block)
            torch.testing.assert_close(room.block_dot(matrices, x, block), expected, atol=1e-4, rtol=1e-4)
for bits in (8, 4):
    rows, x = torch.randn(33, 192), torch.randn(3, 192)
    codes, scale = twin.quantise(rows, bits, 64)
    for blocks in (1, 3):
        last = (torch.arange(3) % blocks, 33 // blocks)
        expected = twin.quantised_dot(codes, scale, x, bits, 64, *last)
        torch.testing.assert_close(room.quantised_dot(codes, scale, x, bits, 64, *last), expected, atol=1e-4, rtol=1e-4)
print("fine")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert run.stdout == "fine\n", run.stderr

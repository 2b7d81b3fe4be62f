"""What a process sets for all of torch changes nothing of ours: dtype, device, determinism, inference mode, threads."""

import ast
import contextlib
import ctypes
import functools
import os
import pathlib
import subprocess
import sys
import threading

import pytest
import tiny
import torch

import popmm
from popmm import kernels, zoo
from popmm.kernels import native
from popmm.method.importance import ChannelStatistics
from popmm.method.modality import JointStatistics
from popmm.runtime.padding import first_copies
from popmm.runtime.trace import Trace

ROOT = pathlib.Path(__file__).parents[2]
NAMES = """
arange as_tensor asarray bartlett_window blackman_window empty empty_permuted empty_strided eye frombuffer full
hamming_window hann_window kaiser_window linspace logspace normal ones rand randint randn randperm range
scalar_tensor tensor tril_indices triu_indices zeros
"""
FACTORIES = set(NAMES.split())


def silent_factories(code: str) -> list[str]:
    """Calls ``torch.name(...)`` that leave a dtype or a device to the process, and uses of its default dtype."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"{node.lineno}: {a.name} by itself" for a in node.names if a.name in FACTORIES]
        if isinstance(node, ast.Attribute) and node.attr in ("get_default_dtype", "FloatTensor", "HalfTensor"):
            found.append(f"{node.lineno}: {node.attr}")
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        given = {keyword.arg for keyword in node.keywords}
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        if of_torch and node.func.attr in FACTORIES and None not in given and not {"dtype", "device"} <= given:
            found.append(f"{node.lineno}: torch.{node.func.attr}({', '.join(sorted(given))})")
    return found


def test_whatever_makes_a_tensor_says_of_which_dtype_and_where():
    sources = [*ROOT.glob("popmm/**/*.py"), *ROOT.glob("adapters/*.py")]
    silent = {str(path.relative_to(ROOT)): silent_factories(path.read_text()) for path in sources}
    assert len(sources) > 50
    assert not {path: found for path, found in silent.items() if found}


def test_silent_factories_are_found():
    assert silent_factories("torch.empty(3, device='cpu')") == ["1: torch.empty(device)"]
    assert silent_factories("from torch import zeros") == ["1: zeros by itself"]
    assert not silent_factories("torch.empty(3, dtype=d, device=x.device), torch.zeros_like(x), x.new_empty(3)")


CASES = {
    "gate 16": (lambda: tiny.dense("llama"), dict(selection="gate", gate_bits=16)),
    "gate 8": (lambda: tiny.dense("llama-bias"), dict(selection="gate", gate_bits=8, fill="mean")),
    "gate 4": (lambda: tiny.dense("olmo2"), dict(selection="gate", gate_bits=4)),
    "gate 4, bf16": (lambda: tiny.build(tiny.DENSE["qwen2"], torch.bfloat16), dict(selection="gate", gate_bits=4)),
    "mask": (lambda: tiny.dense("llama"), dict(selection="mask", fill="mean", prefill="pruned")),
    "keep in place": (lambda: tiny.dense("llama-bias"), dict(selection="keep", layout="permute")),
    "experts, gate 8": (lambda: tiny.moe("mixtral"), dict(selection="gate", gate_bits=8)),
    "experts, mask": (lambda: tiny.moe("qwen2-moe"), dict(selection="mask", importance="routed")),
    "tiers": (lambda: tiny.dense("llama-bias"), dict(selection="tiers", bytes=0.28)),
    "experts, tiers": (lambda: tiny.moe("mixtral"), dict(selection="tiers", bytes=0.28, rest_bits=8)),
    "stories": (lambda: zoo.load("stories")[0], dict(selection="gate")),
}
PROMPT = tiny.prompt(10, batch=2)
MASK = torch.ones_like(PROMPT)
MASK[1, :3] = 0


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def strict():
    torch.use_deterministic_algorithms(True)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def outcome(case, at_attach=contextlib.nullcontext, at_run=contextlib.nullcontext, after=contextlib.nullcontext):
    """Tokens, partitions and masks of one ``generate`` under ``at_run``, and logits of a later chat turn."""
    build, settings = CASES[case]
    model = build()
    with at_attach():
        state = popmm.attach(model, popmm.PopConfig(**({} if "bytes" in settings else {"ffn_ratio": 0.4}), **settings))
    with at_run(), state.trace() as trace:
        out = model.generate(PROMPT, attention_mask=MASK, max_new_tokens=5, do_sample=False)
        orders = {name: p.reading_order.clone() for name, p in state.layers.items()}
        masks = dict(trace)
    first = model.generate(PROMPT[:1], max_new_tokens=2, do_sample=False)
    with at_run(), torch.no_grad():
        ours = model(PROMPT[:1], use_cache=True)
    cache = "cache" if "cache" in ours else "past_key_values"  # by version
    with after(), torch.no_grad():  # statistics made under one setting are added to under another
        logits = model(PROMPT[1:], **{cache: ours[cache]}).logits
    tokens = [p.tokens for p in state.layers.values()]
    popmm.detach(model)
    assert state.passes["decode"] > 0
    return [out, first, logits, *tokens, *orders.values(), *masks.values()]


plain = functools.cache(outcome)


def assert_same(found, expected, rounding=0.0):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.dtype == b.dtype and a.device == b.device
        assert torch.allclose(a, b, rtol=0, atol=rounding) if a.is_floating_point() else torch.equal(a, b)


SETTINGS = {
    "default device meta": lambda: default_device("meta"),
    "deterministic, denormal numbers flushed": strict,
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_changes_nothing(setting, case):
    assert_same(outcome(case, SETTINGS[setting], SETTINGS[setting]), plain(case))


@pytest.mark.parametrize("case", ["gate 4", "mask", "experts, gate 8"])
def test_threads_change_nothing_but_the_rounding_of_torch_itself(case):
    two = functools.partial(threads, 2)
    assert_same(outcome(case, at_run=two), plain(case), rounding=1e-3)


@pytest.mark.parametrize("case", ["gate 8", "keep in place", "experts, mask"])
@pytest.mark.parametrize("where", ["attach", "run", "after"])
def test_inference_mode_may_begin_and_end_anywhere(case, where):
    puts = [torch.inference_mode if where == own else contextlib.nullcontext for own in ("attach", "run", "after")]
    assert_same(outcome(case, *puts), plain(case))


def check_default_dtypes():
    """Run in a process of its own, whose memory a wrong buffer may spoil."""
    torch.set_num_threads(1)
    for case in CASES:
        dtypes = (torch.float64, torch.float16, torch.bfloat16) if case == "stories" else (torch.float16,)
        for dtype in dtypes:
            put = functools.partial(default_dtype, dtype)
            assert_same(outcome(case, put, put, put), plain(case))


def test_the_default_dtype_changes_nothing():
    code = "import test_process_settings as t; t.check_default_dtypes()"
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tests/runtime")])}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=paths, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_weight_of_modalities_does_not_take_the_default_dtype(dtype):
    torch.manual_seed(0)

    def read(n):
        return ChannelStatistics(torch.rand(5).double(), torch.rand(5).double(), torch.tensor(n))

    joint = JointStatistics({"text": read(7), "image": read(70)})
    expected = joint.pooled(0.3).squares
    with default_dtype(dtype):
        assert torch.equal(joint.pooled(0.3).squares, expected)


def test_small_tensors_are_made_where_they_belong():
    with default_device("meta"):
        assert first_copies(None, (4, 3), 2)[:, 0].tolist() == [True, False, True, False]
        assert Trace({"ffn": (5,)})["ffn"].device.type == "cpu"


@pytest.mark.skipif(native.library() is None, reason="no C compiler")
def test_kernels_give_the_same_numbers_on_any_number_of_threads():
    torch.manual_seed(0)
    rows, x = torch.randn(64, 96), torch.randn(3, 96)
    index, h = torch.stack([torch.randperm(64)[:37] for _ in range(3)]), torch.randn(3, 37)
    found = []
    for n in (1, 2, 5, 1):
        with threads(n):
            found.append((kernels.gather_dot(rows, index, x), kernels.gather_sum(rows, index, h)))
    for dot, total in found[1:]:
        assert torch.equal(dot, found[0][0]) and torch.equal(total, found[0][1])


@pytest.mark.skipif(native.library() is None, reason="no C compiler")
def test_kernels_take_as_many_threads_as_torch_may():
    openmp = ctypes.CDLL("libgomp.so.1")
    rows, index, x = torch.randn(64, 96), torch.zeros(1, 64, dtype=torch.int64), torch.randn(1, 96)
    seen = []

    def work():
        openmp.omp_set_num_threads(7)  # what a fresh thread would take on a machine of 7 cores
        before = len(list(pathlib.Path("/proc/self/task").iterdir()))
        kernels.gather_dot(rows, index, x)
        seen.append(len(list(pathlib.Path("/proc/self/task").iterdir())) - before)

    with threads(1):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [0]


AUTOCAST = functools.partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.mark.parametrize("case", [case for case in CASES if case != "stories"])
def test_under_autocast_an_ffn_answers_in_the_dtype_of_a_dense_one(case):
    build, settings = CASES[case]
    model, dtypes = build(), []
    names = [name for name, m in model.named_modules() if name.endswith(("mlp", "block_sparse_moe", "experts"))]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, args, y: dtypes.append(y.dtype))
    with AUTOCAST():
        model.generate(PROMPT, max_new_tokens=3, do_sample=False)
        dense = list(dtypes)
        dtypes.clear()
        with popmm.pruned(
            model, popmm.PopConfig(**({} if "bytes" in settings else {"ffn_ratio": 0.4}), **settings)
        ) as state:
            dtypes.clear()  # attach runs modules too
            model.generate(PROMPT, max_new_tokens=3, do_sample=False)
            assert dtypes == dense
            assert state.passes["decode"] > 0
            for batch in (1, 12):
                ids = tiny.prompt(6, batch=batch)
                assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (batch, 9)


@pytest.mark.parametrize("build", [lambda: tiny.dense("llama"), lambda: tiny.moe("mixtral")], ids=["dense", "experts"])
def test_at_ratio_zero_under_autocast_the_model_is_the_dense_one(build):
    model = build()
    with AUTOCAST():
        how = dict(max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
        expected = model.generate(PROMPT, **how)
        with popmm.pruned(model, popmm.PopConfig(ffn_ratio=0.0)):
            found = model.generate(PROMPT, **how)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits))


@pytest.mark.parametrize("case", CASES)
def test_statistics_under_autocast_are_those_without_as_far_as_it_rounds(case):
    build, settings = CASES[case]
    model, found = build(), []
    with (
        popmm.pruned(
            model, popmm.PopConfig(**({} if "bytes" in settings else {"ffn_ratio": 0.4}), **settings)
        ) as state,
        torch.no_grad(),
    ):
        for put in (contextlib.nullcontext, AUTOCAST):
            with put():
                model(PROMPT[:1])
            found.append([p.importance.clone() for p in state.layers.values()])
    for plain_scores, cast in zip(*found):
        assert cast.dtype == torch.float32
        allowed = 0.1 if "experts" in case else 0.03  # a token near the edge may be routed elsewhere
        assert (cast - plain_scores).norm() <= allowed * plain_scores.norm()


@pytest.mark.parametrize("settings", [dict(gate_bits=16), dict(gate_bits=4)], ids=str)
def test_gate_decodes_the_same_channels_under_autocast(settings, llama):
    with (
        popmm.pruned(
            llama, popmm.PopConfig(**({} if "bytes" in settings else {"ffn_ratio": 0.4}), **settings)
        ) as state,
        torch.no_grad(),
    ):
        llama(PROMPT[:1])
        x = torch.randn(3, 32)
        ffn = state._ffns[0]
        for rows in (x[:1], x):  # rows gathered; all of them computed
            expected, _ = ffn.decode(rows)
            with AUTOCAST():
                found, _ = ffn.decode(rows)
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, expected.to(torch.bfloat16))

"""vLLM with the plug-in against popmm in transformers. ``make test-vllm`` runs these, in an environment with vLLM."""

import os
import statistics
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import popmm
from popmm import zoo

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm", exc_type=ImportError)
os.environ |= dict(  # before vLLM reads them
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)
from vllm import LLM, SamplingParams
from vllm.config import CUDAGraphMode
from vllm.distributed import cleanup_dist_env_and_memory

from popmm.engines.split import SplitFFN
from popmm.engines.vllm import passes
from popmm.engines.vllm.quantization import PopmmConfig

TOKENS = 20
# of log-probabilities: vectors are rounded to 8 bits and channels chosen, which a last bit before may tip over
CLOSE, TIED = 0.05, 0.12
PROMPTS = ["Once upon a time", "The little dog was very happy because", "Tom and Mia went to the big park. They saw"]
TIERS = dict(bytes=0.266)


def engine(name, settings, **how):
    given = dict(dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4, enable_prefix_caching=False)
    overrides = {} if settings is None else {"quantization_config": {"quant_method": "popmm", **settings}}
    return LLM(model=str(zoo.path(name)), quantization="popmm", hf_overrides=overrides, **{**given, **how})


@pytest.fixture
def engines():
    """Engines that go when the test does."""
    made = []

    def make(name, settings, **how):
        made.append(engine(name, settings, **how))
        return made[-1]

    yield make
    made.clear()
    cleanup_dist_env_and_memory()


def sampling(n=TOKENS):
    return SamplingParams(temperature=0, max_tokens=n, logprobs=5, ignore_eos=True)


def answers(llm, prompts, lengths=None):
    return llm.generate(prompts, [sampling(n) for n in lengths or [TOKENS] * len(prompts)], use_tqdm=False)


def reference(name, outputs, config=None, change=None, copies=1):
    """(tokens, log-probabilities ``[n, vocabulary]``) that transformers gives for the same prompts, one by one.

    Args:
        copies: equal sequences that decode together.
    """
    model = AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    found = []
    with popmm.pruned(model, config) if change is None else change(model):
        for output in outputs:
            ids = torch.tensor([output.prompt_token_ids] * copies, dtype=torch.int64, device="cpu")
            how = dict(max_new_tokens=len(output.outputs[0].token_ids), do_sample=False)
            own = model.generate(ids, output_logits=True, return_dict_in_generate=True, **how)
            logits = torch.stack(own.logits)[:, 0].float()
            found.append((own.sequences[0, ids.shape[1] :].tolist(), logits.log_softmax(-1)))
    return found


def off(output, expected):
    """Mean over the tokens of the greatest difference of their log-probabilities, as far as both texts are the same.

    Where they part, the two tokens are as good as each other.
    """
    tokens, logprobs = expected
    found = []
    for step, own in enumerate(output.outputs[0].token_ids):
        given = output.outputs[0].logprobs[step]
        found.append(max(abs(float(logprobs[step, token]) - value.logprob) for token, value in given.items()))
        if own != tokens[step]:
            gap = float(logprobs[step, tokens[step]] - logprobs[step, own])
            assert gap < TIED, f"step {step}: {own} for {tokens[step]}, {gap:.3f} apart"
            break
    assert max(found) < 3 * CLOSE, f"step {found.index(max(found))}: {max(found):.3f} off"
    return statistics.mean(found)


@pytest.mark.parametrize("name", ["stories", "stories-moe"])
def test_all_bytes_are_the_dense_model(name, engines):
    outputs = answers(engines(name, dict(bytes=1)), PROMPTS)
    for output, (tokens, logprobs) in zip(outputs, reference(name, outputs, popmm.PopConfig(bytes=1))):
        assert list(output.outputs[0].token_ids) == tokens
        assert off(output, (tokens, logprobs)) < 1e-3


@pytest.mark.parametrize("how", [{}, dict(enforce_eager=False)], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "name, settings",
    [
        ("stories", TIERS),
        ("stories", dict(bytes=0.19)),
        ("stories", dict(weight_bits=4)),
        ("stories", dict(**TIERS, weights="replace")),
        ("stories-moe", TIERS),
    ],
    ids=str,
)
def test_decode_tokens_are_those_of_popmm_in_transformers(name, settings, how, engines):
    if how and settings != TIERS:
        pytest.skip("one compilation of a model is enough")
    llm = engines(name, settings, **how)
    outputs = [answers(llm, [prompt])[0] for prompt in PROMPTS]
    config = popmm.PopConfig(statistics="weights", **settings)
    for output, expected, dense in zip(
        outputs, reference(name, outputs, config), reference(name, outputs, popmm.PopConfig(bytes=1)), strict=True
    ):
        assert off(output, expected) < CLOSE
        step = output.outputs[0].logprobs[1]  # the first decode token: not the dense model's
        first = max(abs(float(dense[1][1, token]) - value.logprob) for token, value in step.items())
        assert first > 0.01


def test_requests_that_come_and_go_are_answered_as_alone(engines):
    """More of them than places, of many lengths: passes hold prompts and decode tokens at once."""
    llm = engines("stories", dict(**TIERS, together=False))
    prompts, lengths = [*PROMPTS, *reversed(PROMPTS)], [3, TOKENS, 9, TOKENS, 5, 14]
    outputs = answers(llm, prompts, lengths)
    for output, n, expected in zip(
        outputs, lengths, reference("stories", outputs, popmm.PopConfig(statistics="weights", **TIERS)), strict=True
    ):
        assert len(output.outputs[0].token_ids) == n and off(output, expected) < CLOSE


def test_requests_of_one_step_choose_together_as_a_batch_does(engines):
    outputs = answers(engines("stories", TIERS), [PROMPTS[1]] * 4)
    expected = reference("stories", outputs, popmm.PopConfig(statistics="weights", **TIERS), copies=4)
    assert all(off(output, own) < CLOSE for output, own in zip(outputs, expected, strict=True))


def in_two_halves(mlp, share):
    """Forward of an FFN of transformers whose decode tokens choose in each half of the channels by itself."""
    dense, halves = mlp.forward, []
    for own in torch.arange(mlp.gate_proj.out_features, dtype=torch.int64, device="cpu").chunk(2):
        halves.append(SplitFFN("half", share))
        halves[-1].hold("gate_up", torch.cat([mlp.gate_proj.weight[own], mlp.up_proj.weight[own]]), None)
        halves[-1].hold("down", mlp.down_proj.weight[:, own], None)
        halves[-1].activation = "silu"

    def one(ffn, x):
        gate, up = ffn.gate_up(x).chunk(2, dim=-1)
        return ffn.down(F.silu(gate) * up)

    return lambda x: dense(x) if x.shape[1] > 1 else sum(one(ffn, x[0]) for ffn in halves)[None]


def test_each_rank_of_two_chooses_among_its_own_channels(engines):
    outputs = answers(engines("stories", dict(**TIERS, together=False), tensor_parallel_size=2), PROMPTS)

    def halved(model):
        for layer in model.model.layers:
            layer.mlp.forward = in_two_halves(layer.mlp, TIERS["bytes"])
        return nullcontext()

    for output, expected in zip(outputs, reference("stories", outputs, change=halved), strict=True):
        assert off(output, expected) < CLOSE
    whole = reference("stories", outputs, popmm.PopConfig(statistics="weights", **TIERS))
    assert max(map(off, outputs, whole)) > 0.01  # who choose among all of them choose otherwise


def test_experts_on_two_ranks(engines):
    outputs = answers(engines("stories-moe", dict(weight_bits=8), tensor_parallel_size=2), PROMPTS)
    expected = reference("stories-moe", outputs, popmm.PopConfig(statistics="weights", weight_bits=8))
    assert all(off(output, own) < CLOSE for output, own in zip(outputs, expected, strict=True))


def test_settings():
    assert PopmmConfig().share == pytest.approx(popmm.PopConfig().bytes)
    config = PopmmConfig.from_config(dict(quant_method="popmm", bytes=0.25, weights="replace", together=False))
    assert (config.share, config.weights, config.together) == (0.25, "replace", False)
    assert PopmmConfig(weight_bits=5).share < 1 and PopmmConfig(bytes=1).share == 1
    for wrong, message in (
        (dict(ratio=0.4), "does not know ratio: give bytes"),
        (dict(bytes=2), "bytes=2"),
        (dict(weight_bits=9), "weight_bits=9"),
        (dict(together="yes"), "together='yes'"),
    ):
        with pytest.raises(ValueError, match=message):
            PopmmConfig(**wrong)


def test_what_would_run_past_the_methods_is_refused(engines):
    with pytest.raises(ValueError, match="leave LoRA out"):
        engines("stories", None, enable_lora=True)


def test_cuda_graphs_are_refused():
    how = SimpleNamespace(cudagraph_mode=CUDAGraphMode.PIECEWISE)
    with pytest.raises(ValueError, match="give --enforce-eager"):
        passes.check(SimpleNamespace(lora_config=None, compilation_config=how))


def test_rows_of_a_pass():
    starts = torch.tensor([0, 1, 6, 7, 8], dtype=torch.int32, device="cpu")
    lengths = torch.tensor([9, 12, 1, 4], dtype=torch.int32, device="cpu")  # the third is at its first token
    own = SimpleNamespace(query_start_loc=starts, seq_lens=lengths, num_actual_tokens=8)
    rows = passes._read({"attention": own})
    assert rows.decoding.tolist() == [0, 7] and rows.others.tolist() == [1, 2, 3, 4, 5, 6]
    assert passes._read(None) is None and passes._read({"mixer": object()}) is None
    x = torch.arange(10.0, dtype=torch.float32, device="cpu")[:, None]  # two rows of padding
    y = passes.by_rows(x, rows, lambda own, more: -own, lambda own, more: own + more, x)
    assert y.flatten().tolist() == [0, 2, 4, 6, 8, 10, 12, -7, 0, 0]

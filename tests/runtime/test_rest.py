"""The rest of the model in fewer bits: attention and the output layer, at decode steps alone."""

import pytest
import tiny
import torch
from matrix import MODELS, generate

import popmm
from popmm.kernels import planes
from popmm.runtime.phase import Phase

NAMES = ["llama", "qwen2", "phi", "mixtral", "gpt-oss", "deepseek-v3", "llava (pictures)"]  # with biases and without


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_a_model_with_rounded_weights(name):
    case = MODELS[name]
    model = case.build()
    inputs = case.prompt(model)
    _, dense = generate(model, inputs)
    with popmm.pruned(model, ffn_ratio=0.0, rest_bits=8) as state:
        found, logits = generate(model, inputs)
        names = [layer.name for layer in state._rest]
        read, plain = state.rest_bytes()
        assert "rest_bits=8" in state.summary()
    assert any("attn" in n for n in names) and any(n.endswith("lm_head") for n in names)
    assert not any("gate" in n or "router" in n or "vision" in n for n in names)
    assert 0.25 < read / plain < 0.3  # of float32
    assert torch.equal(logits[0], dense[0])  # the prompt's own token
    rounded = case.build()  # the same, by writing the rounded weights into the model after its prompt
    for own in names:
        weight = rounded.get_submodule(own).weight.data
        weight.copy_(planes.decode(planes.encode(weight), 8))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        expected = rounded(found[:, :1], past_key_values=cache).logits[:, -1]
    assert (logits[1] - expected).norm() <= 0.05 * expected.norm()  # vectors are rounded to 8 bits too
    assert not torch.equal(logits[1], dense[1])
    theirs = generate(model, inputs)[1]
    assert torch.equal(theirs, dense)


def test_one_simulated_pass_equals_decoding_token_by_token(llama):
    ids, continuation = tiny.prompt(9), tiny.prompt(4, seed=3)
    with popmm.pruned(llama, ffn_ratio=0.4, selection="mask", rest_bits=8) as state, torch.no_grad():
        cache = llama(ids).past_key_values
        one_by_one = torch.cat([llama(t.view(1, 1), past_key_values=cache).logits[0] for t in continuation[0]])
        cache = llama(ids).past_key_values
        with state.simulated_decode():
            at_once = llama(continuation, past_key_values=cache).logits[0]
    assert (at_once - one_by_one).norm() <= 0.03 * one_by_one.norm()


def test_changed_weights_are_read_again(llama):
    with popmm.pruned(llama, ffn_ratio=0.0, rest_bits=8):
        before = generate(llama, {"input_ids": tiny.prompt(9)})[1]
        llama.lm_head.weight.data.mul_(2)
        after = generate(llama, {"input_ids": tiny.prompt(9)})[1]
    torch.testing.assert_close(after[1], 2 * before[1], atol=0.02, rtol=0.02)


def test_larger_batches_read_the_weights_as_they_are(llama):
    inputs = {"input_ids": tiny.prompt(9, batch=9)}
    dense = generate(llama, inputs)[1]
    with popmm.pruned(llama, ffn_ratio=0.0, rest_bits=4):
        assert torch.equal(generate(llama, inputs)[1], dense)


@pytest.mark.parametrize("bits", [9, 0, True, "8"])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"rest_bits=.*: give 16 \(as they are\), 8, 7, 6, 5, 4 or 3"):
        popmm.PopConfig(rest_bits=bits)


def test_weights_that_are_no_numbers_are_refused(llama):
    llama.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="lm_head holds weights that are no finite numbers"):
        popmm.attach(llama, ffn_ratio=0.0, rest_bits=8)
    assert "forward" not in llama.model.__dict__


def test_models_that_ask_for_the_name_of_their_attention_keep_it():
    """Sparse attention (DeepSeek V3.2) is on by the name of the attention."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DeepseekV32Config"):
        pytest.skip("no such model")
    from popmm.runtime.attention import attention_overrides

    assert attention_overrides(MODELS["llama"].build().model, Phase())
    with torch.device("meta"):
        model = transformers.DeepseekV32Model(transformers.DeepseekV32Config(num_hidden_layers=1))
    assert not attention_overrides(model, Phase())

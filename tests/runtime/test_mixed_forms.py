"""Forms of FFNs and of weights together: pairs of projections, adapters, quantised layers, writes, batches, drafts."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import OPTForCausalLM

import popmm

HOW = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
IDS = tiny.prompt(9)
NAMED = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS))


def with_lora(model, targets, scale=0.2):
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets)).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


@pytest.mark.parametrize("settings", [dict(bytes=0.35), dict(ffn_ratio=0.4, selection="mask")], ids=str)
@pytest.mark.parametrize("name, targets", [("opt", ["fc1", "fc2"]), ("bloom", ["dense_h_to_4h", "dense_4h_to_h"])])
def test_adapters_on_projections_that_are_no_module_serve_prompt_after_prompt(name, targets, settings):
    model = with_lora(tiny.dense(name), targets)
    with popmm.pruned(model, **settings) as state:
        first = model.generate(**NAMED, **HOW)
        assert torch.equal(model.generate(**NAMED, **HOW), first)
        assert state.passes["decode"] == 8 and state.passes["dense"] == 0


def test_projections_that_are_no_module_may_be_quantised():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tiny.dense("opt")
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith(("fc1", "fc2")))
    dense = model.generate(**NAMED, **HOW)
    with popmm.pruned(model, bytes=0.35) as state:
        model.generate(**NAMED, **HOW)
        assert torch.equal(model.generate(**NAMED, **HOW), model.generate(**NAMED, **HOW))
        assert state.passes["decode"] == 12 and not state.passes["dense"]
    assert torch.equal(model.generate(**NAMED, **HOW), dense)


def test_writes_to_the_plain_layers_beside_adapted_ones_are_seen():
    model = with_lora(tiny.dense("llama"), ["up_proj"])
    down = model.base_model.model.model.layers[0].mlp.down_proj
    with popmm.pruned(model, weight_bits=8):
        model.generate(**NAMED, **HOW)
        with torch.no_grad():
            down.weight.mul_(-1.5)
        found = model.generate(**NAMED, **HOW, output_logits=True, return_dict_in_generate=True).logits[-1]
    with popmm.pruned(model, weight_bits=8):
        expected = model.generate(**NAMED, **HOW, output_logits=True, return_dict_in_generate=True).logits[-1]
    torch.testing.assert_close(found, expected)


def test_bytes_of_an_ffn_whose_layers_are_adapted_in_part_count_all_of_it():
    model = with_lora(tiny.dense("llama"), ["up_proj"])
    with popmm.pruned(model, ffn_ratio=0.4, selection="keep") as state:
        read, dense = state.bytes_per_token()
    assert read < dense


def test_freed_pairs_refuse_what_would_read_them_and_count_their_prompt_once(tmp_path):
    tiny.dense("opt").save_pretrained(tmp_path)
    model, counted = OPTForCausalLM.from_pretrained(tmp_path).eval(), {}
    for weights in ("keep", "replace"):
        with popmm.pruned(model, bytes=0.4, weights=weights) as state, torch.no_grad():
            model(**NAMED, use_cache=True)
            counted[weights] = [int(p.tokens_by_modality["text"]) for p in state.layers.values()]
            if weights == "replace":
                with pytest.raises(RuntimeError, match="weights='replace'"):
                    model.model.decoder.layers[0].fc1.state_dict()
    assert counted["keep"] == counted["replace"] == [9] * len(counted["keep"])


def test_when_all_rows_choose_what_fills_they_all_have_a_vote():
    model = tiny.dense("llama")
    ids = tiny.prompt(9, batch=2)
    with popmm.pruned(model, bytes=0.3) as state:
        with state._runner.around.generating(1, {7}):
            votes = state._runner.around.votes({"input_ids": torch.full((2, 1), 7)}, (2, 1))
            assert votes.tolist() == [1.0, 1.0]
            votes = state._runner.around.votes({"input_ids": torch.tensor([[7], [8]])}, (2, 1))
            assert votes.tolist() == [0.0, 1.0]
        model.generate(ids, attention_mask=torch.ones_like(ids), **HOW)


def test_adapted_models_draft_too():
    model = with_lora(tiny.dense("llama"), ["q_proj", "up_proj"])
    dense = model.generate(**NAMED, max_new_tokens=12, do_sample=False)
    with popmm.pruned(model, lossless=True, draft_tokens=3) as state:
        assert torch.equal(model.generate(**NAMED, max_new_tokens=12, do_sample=False), dense)
        assert state.passes.drafted > 0
    with popmm.pruned(model, bytes=0.3), pytest.raises(ValueError, match="adapter_names gives rows adapters"):
        model.generate(**NAMED, **HOW, adapter_names=["default"])

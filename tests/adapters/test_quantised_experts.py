"""Stacks of experts in a quantised tensor class, or dequantised while they load."""

import json

import pytest
import tiny
import torch
from matrix import generate
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig

import popmm

STACKS = ("gate_up_proj", "down_proj")
INPUTS = {"input_ids": tiny.prompt(9)}


def quantised(config: str, implementation: str):
    library = pytest.importorskip("torchao.quantization")
    model = tiny.moe("mixtral", implementation)
    names = {f"model.layers.{i}.mlp.experts.{name}": getattr(library, config)() for i in (0, 1) for name in STACKS}
    library.quantize_(model, library.FqnToConfig(names), filter_fn=None)
    return model


def dequantised(model):
    plain = tiny.moe("mixtral", "eager")
    with torch.no_grad():
        for layer, own in zip(model.model.layers, plain.model.layers):
            for name in STACKS:
                getattr(own.mlp.experts, name).copy_(getattr(layer.mlp.experts, name).dequantize())
    return plain


@pytest.mark.parametrize(
    "config, implementation",
    [("Int8WeightOnlyConfig", "eager"), ("Float8WeightOnlyConfig", "grouped_mm")],
)
def test_experts_that_tell_their_values_decode_as_dequantised_ones_do(config, implementation):
    model = quantised(config, implementation)
    plain, own = dequantised(model), generate(model, INPUTS)[1]
    with popmm.pruned(plain, selection="tiers", bytes=0.3) as state:
        expected = generate(plain, INPUTS)
        planes = [ffn.layout.gate for ffn in state._ffns]
    with popmm.pruned(model, selection="tiers", bytes=0.3) as state:
        tokens, logits = generate(model, INPUTS)
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logits, expected[1], rtol=1e-3, atol=1e-3)
        for ffn, theirs in zip(state._ffns, planes):
            assert all(torch.equal(a, b) for a, b in zip(ffn.layout.gate, theirs))
            stacks = [getattr(ffn.site.module, name).data for name in STACKS]
            every = sum(t.qdata.nbytes + t.scale.nbytes for t in stacks)
            assert every <= ffn.site.active_bytes() * 6 / 2 <= 1.05 * every  # zero points lie there too
        assert all("rounding it again" in note for note in state.notes().values())
    with popmm.pruned(model, bytes=1.0):
        assert torch.equal(generate(model, INPUTS)[1], own)
    assert torch.equal(generate(model, INPUTS)[1], own)


def test_experts_that_do_not_run_as_the_model_is_set_are_refused_with_what_may_help():
    model = quantised("Int8WeightOnlyConfig", "batched_mm")
    with pytest.raises(popmm.UnsupportedModelError, match=r"Int8Tensor.*set_experts_implementation\('eager'\)"):
        popmm.attach(model, selection="tiers", bytes=0.3)


def test_other_selections_of_quantised_experts_are_refused():
    with pytest.raises(popmm.UnsupportedModelError, match=r"Int8Tensor.*selection='tiers'"):
        popmm.attach(quantised("Int8WeightOnlyConfig", "eager"), selection="gate", ffn_ratio=0.3)


def test_mxfp4_experts_arrive_dequantised_on_a_cpu(tmp_path):
    config = GptOssConfig(**{**tiny.MOE["gpt-oss"].to_dict(), "hidden_size": 64, "intermediate_size": 64})
    tiny.build(config, torch.bfloat16).save_pretrained(tmp_path)
    file, tensors = tmp_path / "model.safetensors", {}
    generator = torch.Generator().manual_seed(0)
    for name, t in load_file(file).items():
        if not name.endswith(STACKS):
            tensors[name] = t
            continue
        experts, inputs, outputs = t.shape
        blocks, byte = (experts, outputs, inputs // 32), dict(dtype=torch.uint8, generator=generator)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), **byte)
        tensors[f"{name}_scales"] = torch.randint(122, 126, blocks, **byte)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    own = generate(model, INPUTS)[1]
    with popmm.pruned(model, selection="tiers", bytes=0.3) as state:
        assert generate(model, INPUTS)[1].isfinite().all() and state.passes["decode"] == 3
        assert not state.notes() and all(ffn.site.is_experts for ffn in state._ffns)
    assert torch.equal(generate(model, INPUTS)[1], own)

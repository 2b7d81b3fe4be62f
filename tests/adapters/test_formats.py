"""Every quantisation format that installs on a CPU, as transformers loads it."""

import pytest
import tiny
import tiny_quantised as formats
import torch
from matrix import generate
from popmm.adapters.quantised import dequantised

import popmm
from popmm import kernels
from popmm.kernels.grid import on_grid

# gptqmodel loads for seconds, and has its layers compiled
SLOW = [name for name in formats.FORMATS if name.startswith(("gptq", "awq"))]
INPUTS = {"input_ids": tiny.prompt(9)}
SOME = ("bitsandbytes int8", "bitsandbytes nf4", "compressed-tensors int4", "gptq 4", "gptq 8", "awq", "hqq 4")


def each(names):
    marks = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]
    return pytest.mark.parametrize("name", marks)


@each(formats.FORMATS)
def test_a_format_decodes_in_tiers_and_comes_back_exactly(name, tmp_path):
    model = formats.FORMATS[name](tmp_path, torch.float32)
    with popmm.pruned(model, bytes=1.0):  # before anything else has run the model
        own = generate(model, INPUTS)[1]
    expected = generate(model, INPUTS)[1]
    assert torch.equal(own, expected)
    for settings, close in ((dict(bytes=0.3), 0.25), (dict(weight_bits=8), 0.08)):
        with popmm.pruned(model, selection="tiers", **settings) as state:
            found = generate(model, INPUTS)[1]
            assert state.passes["decode"] == 3
            assert (name in formats.PLAIN) == (not state.notes())
            one = [ffn.site.packed is not None and ffn.site.packed.one_plane for ffn in state._ffns]
            assert one == [name in formats.ONE_PLANE] * 2
        assert torch.equal(found[0], expected[0]) and not torch.equal(found[1], expected[1])
        assert (found[1] - expected[1]).abs().max() <= close * expected[1].abs().max()
        assert torch.equal(generate(model, INPUTS)[1], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@each(SOME)
def test_layers_are_read_in_the_dtype_in_which_the_model_calls_them(name, dtype, tmp_path):
    model = formats.FORMATS[name](tmp_path, dtype)
    with popmm.pruned(model, selection="tiers", bytes=0.3) as state:
        assert generate(model, INPUTS)[1].isfinite().all()
        assert state.passes["decode"] == 3
        assert all(ffn.site.weights().down.dtype == dtype for ffn in state._ffns)


TELLS = {
    "torchao int8": lambda layer: layer.weight.qdata.float() * layer.weight.scale,
    "torchao int4": lambda layer: layer.weight.dequantize(),
    "quanto int8": lambda layer: layer.weight._data.float() * layer.weight._scale,
    "hqq 4": lambda layer: layer.dequantize(),
    "compressed-tensors int8": lambda layer: (layer.weight / layer.weight_scale).round() * layer.weight_scale,
    "gptq 4": lambda layer: layer.dequantize_weight().T,
}


@each(TELLS)
def test_weights_are_exactly_those_of_the_package(name, tmp_path):
    model = formats.FORMATS[name](tmp_path, torch.float32)
    with popmm.pruned(model, selection="tiers", bytes=0.3) as state:
        mlp, read = model.model.layers[1].mlp, state._ffns[1].site.read()
        for layer, own in zip((mlp.gate_proj, mlp.up_proj, mlp.down_proj), read):
            torch.testing.assert_close(own.float(), TELLS[name](layer).float(), rtol=1e-6, atol=0)


def test_bitsandbytes_weights_are_those_of_the_package_as_its_layer_rounds_them(tmp_path):
    library = pytest.importorskip("bitsandbytes")
    for name in ("bitsandbytes nf4", "bitsandbytes int8"):
        layer = formats.FORMATS[name](tmp_path / name[-4:], torch.float32).model.layers[0].mlp.down_proj
        if name.endswith("nf4"):  # asked before the layer runs, for it repacks its weights then
            expected = library.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        else:
            expected = library.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        found = dequantised(layer, "down_proj", torch.float32)
        torch.testing.assert_close(found, expected.float(), rtol=2**-7, atol=1e-7)  # answers in 16 bits


@each(formats.ONE_PLANE)
def test_weights_of_four_bits_keep_their_codes_in_half_the_memory(name, tmp_path):
    model = formats.FORMATS[name](tmp_path, torch.float32)
    with popmm.pruned(model, selection="tiers", bytes=0.3) as state:
        for ffn in state._ffns:
            layout, source = ffn.layout, ffn.site.read()
            assert on_grid(source.gate) and layout.gate.precisions == (4,) and layout.down.precisions == (8, 6, 4)
            for part, own in ((layout.gate, source.gate), (layout.up, source.up)):
                assert part.bytes() * 8 == 4.25 * own.numel()
                held = kernels.planes_decode(part, 8, torch.float32)
                assert (held - own.float()).norm() <= 5e-4 * own.float().norm()  # 16 bits of the step
        note = next(iter(state.notes().values()))
        assert "gate and up lie in 4 bits as they came" in note and "rounding down again" in note


def test_compressed_weights_are_unpacked_as_by_a_first_forward(tmp_path):
    build = formats.FORMATS["compressed-tensors int4"]
    model, other = build(tmp_path / "a", torch.float32), build(tmp_path / "b", torch.float32)
    assert not hasattr(model.model.layers[0].mlp.gate_proj, "weight")
    popmm.attach(model, selection="tiers", bytes=0.3)
    popmm.detach(model)
    generate(other, INPUTS)
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)

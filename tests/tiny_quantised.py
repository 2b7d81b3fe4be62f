"""Tiny Llamas in the formats of quantisation libraries, loaded by transformers as their checkpoints are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, QuantoConfig, TorchAoConfig

WIDTH, D_FF = 64, 128
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def llama(dtype: torch.dtype):
    return tiny.build(LlamaConfig(**{**tiny.COMMON, "hidden_size": WIDTH, "intermediate_size": D_FF}), dtype)


def load(folder: Path, dtype: torch.dtype, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings).eval()


def by_config(make):
    """Quantised by transformers while it loads."""

    def build(folder: Path, dtype: torch.dtype):
        config = make()
        llama(dtype).save_pretrained(folder)
        return load(folder, dtype, quantization_config=config)

    return build


def torchao(name: str, **settings):
    def make():
        pytest.importorskip("torchao")
        import torchao.quantization as library
        from torchao.quantization.granularity import PerGroup

        own = {key: PerGroup(value) if key == "granularity" else value for key, value in settings.items()}
        return TorchAoConfig(getattr(library, name)(**own))

    return by_config(make)


def bitsandbytes(**settings):
    def make():
        pytest.importorskip("bitsandbytes")
        return BitsAndBytesConfig(**settings)

    return by_config(make)


def quanto(weights: str):
    def make():
        pytest.importorskip("optimum.quanto")
        return QuantoConfig(weights=weights)

    return by_config(make)


def hqq(bits: int):
    def build(folder: Path, dtype: torch.dtype):
        core = pytest.importorskip("hqq.core.quantize")
        model, how = llama(dtype), core.BaseQuantizeConfig(nbits=bits, group_size=64)
        for layer in model.model.layers:
            for name in PROJECTIONS:
                own = core.HQQLinear(getattr(layer.mlp, name), how, compute_dtype=dtype, device="cpu")
                setattr(layer.mlp, name, own)
        return model.eval()

    return build


def rewritten(folder: Path, model, change, quantization: dict) -> None:
    """Saves a model whose linear layers' tensors become those of ``change(weight)``, by suffix."""
    model.save_pretrained(folder)
    file, tensors = folder / "model.safetensors", {}
    for name, t in load_file(file).items():
        if name.endswith("_proj.weight"):
            tensors |= {name.removesuffix("weight") + suffix: own for suffix, own in change(t).items()}
        else:
            tensors[name] = t
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def grid(weight: torch.Tensor, group: int, bits: int = 4, symmetric: bool = True):
    """Codes from 0 ``[out, in]``, float16 scales and zero points ``[out, groups]``."""
    parts, top = weight.float().unflatten(1, (-1, group)), 2**bits - 1
    if symmetric:
        scale, zero = parts.abs().amax(-1) / (2 ** (bits - 1) - 1), torch.full(parts.shape[:2], 2.0 ** (bits - 1))
    else:
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scale = (high - low) / top
        zero = (-low / scale).round()
    scale = scale.half()
    code = ((parts / scale.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, top)
    return code.flatten(1).long(), scale, zero.long()


def words(codes: torch.Tensor, bits: int, dim: int, order=None) -> torch.Tensor:
    """Codes packed into int32 along a dimension."""
    own = codes.movedim(dim, -1).unflatten(-1, (-1, 32 // bits))
    own = own if order is None else own[..., order]
    packed = (own << (torch.arange(32 // bits) * bits)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).movedim(-1, dim).contiguous()


def gptq(bits: int = 4, group: int = 64, symmetric: bool = True, act_order: bool = False):
    def change(weight):
        order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0)) if act_order else None
        order = torch.arange(weight.shape[1]) if order is None or weight.shape[1] != WIDTH else order
        code, scale, zero = grid(weight[:, order], group, bits, symmetric)
        back = order.argsort()
        return {
            "qweight": words(code[:, back].T, bits, 0),
            "qzeros": words((zero.T - 1) & (2**bits - 1), bits, 1),
            "scales": scale.T.contiguous(),
            "g_idx": (torch.arange(weight.shape[1]) // group)[back].int(),
        }

    how = dict(quant_method="gptq", bits=bits, group_size=group, sym=symmetric, desc_act=act_order)

    def build(folder: Path, dtype: torch.dtype):
        pytest.importorskip("gptqmodel")
        pytest.importorskip("optimum")
        rewritten(folder, llama(torch.float16), change, {**how, "checkpoint_format": "gptq"})
        return load(folder, dtype, device_map="cpu")

    return build


def awq(group: int = 64):
    def change(weight):
        code, scale, zero = grid(weight, group, symmetric=False)
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        packed = {"qweight": words(code.T, 4, 1, order), "qzeros": words(zero.T, 4, 1, order)}
        return {**packed, "scales": scale.T.contiguous()}

    def build(folder: Path, dtype: torch.dtype):
        pytest.importorskip("gptqmodel")
        how = dict(quant_method="awq", bits=4, group_size=group, zero_point=True, version="gemm")
        rewritten(folder, llama(torch.float16), change, how)
        return load(folder, dtype, device_map="cpu")

    return build


def compressed_tensors(weights: dict, inputs: dict | None = None):
    """Saved by the library as its own quantisers do, with scales of the largest weight."""

    def build(folder: Path, dtype: torch.dtype):
        library = pytest.importorskip("compressed_tensors.quantization")
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization.utils.helpers import calculate_qparams

        how = library.QuantizationArgs(**weights, symmetric=True)
        inputs_how = None if inputs is None else library.QuantizationArgs(**inputs, symmetric=True)
        scheme = library.QuantizationScheme(targets=["Linear"], weights=how, input_activations=inputs_how)
        model = llama(dtype)
        library.apply_quantization_config(
            model,
            library.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], quantization_status="frozen"),
        )
        for layer in (part for part in model.modules() if hasattr(part, "quantization_scheme")):
            parts = layer.weight.data.unflatten(1, (-1, how.group_size or layer.in_features))
            scale, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), how)
            layer.weight_scale.data.copy_(scale.view_as(layer.weight_scale))
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)
        return load(folder, dtype)

    return build


def fp8(folder: Path, dtype: torch.dtype):
    """Blocks of 16 by 16 in 8-bit floats, as DeepSeek's checkpoints: dequantised on a CPU."""

    def change(weight):
        parts = weight.float().unflatten(1, (-1, 16)).unflatten(0, (-1, 16))
        scale = parts.abs().amax((1, 3)) / 448
        packed = (parts / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        return {"weight": packed, "weight_scale_inv": scale}

    how = dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[16, 16])
    rewritten(folder, llama(dtype), change, how)
    return load(folder, dtype)


INT4, INT8 = dict(num_bits=4, type="int"), dict(num_bits=8, type="int")
TOKENS = dict(strategy="token", dynamic=True)
FORMATS = {
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int8, inputs too": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "torchao int4": torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=64),
    "bitsandbytes int8": bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bitsandbytes fp4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "quanto int8": quanto("int8"),
    "quanto int4": quanto("int4"),
    "hqq 4": hqq(4),
    "compressed-tensors int4": compressed_tensors({**INT4, "strategy": "group", "group_size": 64}),
    "compressed-tensors int8": compressed_tensors({**INT8, "strategy": "channel"}),
    "compressed-tensors int8, inputs too": compressed_tensors({**INT8, "strategy": "channel"}, {**INT8, **TOKENS}),
    "compressed-tensors float8": compressed_tensors(
        {**INT8, "type": "float", "strategy": "channel"}, {**INT8, "type": "float", **TOKENS}
    ),
    "gptq 4": gptq(),
    "gptq 4, zero points": gptq(symmetric=False),
    "gptq 4, act order": gptq(act_order=True, group=32),
    "gptq 8": gptq(bits=8),
    "awq": awq(),
    "fp8": fp8,
}
ONE_PLANE = ("torchao int4", "compressed-tensors int4", "gptq 4")
PLAIN = ("fp8",)  # dequantised while they load

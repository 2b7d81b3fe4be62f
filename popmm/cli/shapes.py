"""Configurations of well-known models, for benchmarks with random weights: speed does not depend on their values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)


def _sizes(d_model: int, d_ff: int, layers: int, heads: int, kv_heads: int, vocab: int, **more) -> dict:
    return dict(
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        **more,
    )


def _qwen25_vl_7b() -> PretrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = _sizes(3584, 18944, 28, 28, 4, 152064, rope_parameters=rope)
    # the tower takes no part in decoding
    vision = dict(depth=1, hidden_size=64, out_hidden_size=3584, intermediate_size=64, num_heads=4)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision)


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-3.1-8b": lambda: LlamaConfig(**_sizes(4096, 14336, 32, 32, 8, 128256)),
    "qwen3-8b": lambda: Qwen3Config(**_sizes(4096, 12288, 36, 32, 8, 151936, head_dim=128)),
    "qwen2.5-vl-7b": _qwen25_vl_7b,
    "mixtral-8x7b": lambda: MixtralConfig(
        **_sizes(4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2)
    ),
    "qwen1.5-moe": lambda: Qwen2MoeConfig(
        **_sizes(2048, 5632, 24, 16, 16, 151936),
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts=60,
        num_experts_per_tok=4,
    ),
    "qwen3-30b-a3b": lambda: Qwen3MoeConfig(
        **_sizes(2048, 6144, 48, 32, 4, 151936, head_dim=128),
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
    ),
    # of a size that a CPU decodes
    "dense-2k": lambda: LlamaConfig(**_sizes(2048, 8192, 8, 32, 8, 32000)),
    "moe-1k": lambda: MixtralConfig(**_sizes(1024, 2816, 8, 16, 4, 32000, num_local_experts=16, num_experts_per_tok=2)),
}


def shape_config(name: str, layers: int | None = None, tiny: bool = False) -> PretrainedConfig:
    """Configuration of a shape.

    Args:
        name: key of ``SHAPES``.
        layers: fewer layers than the original.
        tiny: the same structure at a sixteenth of every width, two layers: for dry runs.
    """
    if name not in SHAPES:
        raise ValueError(f"--shape {name}: give one of {', '.join(SHAPES)}")
    config = SHAPES[name]()
    text = config.get_text_config()
    if tiny:
        layers = 2
        for field in ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
            if isinstance(getattr(text, field, None), int):
                setattr(text, field, getattr(text, field) // 16)
        text.num_attention_heads, text.num_key_value_heads, text.vocab_size = 4, 2, 512
        text.head_dim = text.hidden_size // 4
        for field in ("num_local_experts", "num_experts"):
            if isinstance(getattr(text, field, None), int):
                setattr(text, field, 8)
        if getattr(text, "num_experts_per_tok", None):
            text.num_experts_per_tok = 2
        if config is not text:
            config.vision_config.out_hidden_size = text.hidden_size
            half = text.head_dim // 2
            text.rope_parameters["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    if layers is not None:
        text.num_hidden_layers = min(layers, text.num_hidden_layers)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
    return config


def random_model(config: PretrainedConfig, dtype: torch.dtype, device: str):
    """A model of random weights in eval mode, made on its device."""
    torch.manual_seed(0)
    auto = AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping:
        auto = AutoModelForImageTextToText
    with torch.device(device):
        model = auto.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.eval()

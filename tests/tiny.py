"""Tiny random models, one per architecture that the tests cover."""

from __future__ import annotations

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PhimoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Starcoder2Config,
)

VOCAB = 64
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)

DENSE = {
    "llama": LlamaConfig(**COMMON),
    "llama-bias": LlamaConfig(**COMMON, mlp_bias=True),
    "mistral-sliding": MistralConfig(**COMMON, sliding_window=8),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=8),
    "gemma2": Gemma2Config(**COMMON, head_dim=8, sliding_window=8),
    "gemma3": Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=8),
    "phi3": Phi3Config(**COMMON),
    "olmo2": Olmo2Config(**COMMON),
    "glm4": Glm4Config(**COMMON, head_dim=8),
}

SMALL = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1)
# FFNs without a gate
UNGATED = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_inner=80, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=None
    ),
    "nemotron": NemotronConfig(**COMMON, head_dim=8),
    "phi": PhiConfig(**COMMON),
    "starcoder2": Starcoder2Config(**COMMON, use_bias=False),
    "gpt-neox": GPTNeoXConfig(**SMALL, intermediate_size=80, pad_token_id=0, eos_token_id=None),
    "falcon": FalconConfig(**SMALL, ffn_hidden_size=80, pad_token_id=0, eos_token_id=None),
    "bloom": BloomConfig(**SMALL, pad_token_id=0, eos_token_id=None),
    "opt": OPTConfig(
        **SMALL, ffn_dim=80, max_position_embeddings=128, word_embed_proj_dim=32, pad_token_id=0, eos_token_id=None
    ),
}

EXPERTS = {k: v for k, v in COMMON.items() if k != "intermediate_size"}
MOE = {
    "mixtral": MixtralConfig(
        **EXPERTS, intermediate_size=48, num_local_experts=6, num_experts_per_tok=2, sliding_window=None
    ),
    "qwen2-moe": Qwen2MoeConfig(
        **EXPERTS,
        intermediate_size=80,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=64,
        num_experts=6,
        num_experts_per_tok=2,
    ),
    "qwen3-moe": Qwen3MoeConfig(
        **EXPERTS, moe_intermediate_size=48, num_experts=6, num_experts_per_tok=3, head_dim=8, mlp_only_layers=[]
    ),
    "olmoe": OlmoeConfig(**EXPERTS, intermediate_size=48, num_experts=6, num_experts_per_tok=2),
    "deepseek-v3": DeepseekV3Config(
        **{**EXPERTS, "num_key_value_heads": 4},
        intermediate_size=80,
        moe_intermediate_size=48,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "granite-moe": GraniteMoeConfig(**EXPERTS, intermediate_size=48, num_local_experts=6, num_experts_per_tok=2),
    "gpt-oss": GptOssConfig(
        **EXPERTS,
        intermediate_size=48,
        num_local_experts=6,
        num_experts_per_tok=2,
        head_dim=8,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "phimoe": PhimoeConfig(
        **EXPERTS, intermediate_size=48, num_local_experts=6, num_experts_per_tok=2, sliding_window=None
    ),
}


def build(config, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A random causal language model in eval mode. Weights are wide enough for channels to differ."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
            elif "bias" in "".join(n for n, p in model.named_parameters() if p is parameter):
                parameter.normal_(std=0.1)
    model.generation_config.eos_token_id = None
    return model


def dense(name: str, **changes):
    config = {**DENSE, **UNGATED}[name]
    if changes.pop("dtype", None) is not None:
        raise TypeError("give dtype to build")
    return build(type(config)(**{**config.to_dict(), **changes}))


def moe(name: str, implementation: str | None = None):
    model = build(type(MOE[name])(**MOE[name].to_dict()))
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model


def prompt(n_tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Token ids ``[batch, n_tokens]`` without special tokens."""
    return torch.randint(4, VOCAB, (batch, n_tokens), generator=torch.Generator().manual_seed(seed))


def from_name(model_type: str, **settings):
    return build(AutoConfig.for_model(model_type, **settings))
